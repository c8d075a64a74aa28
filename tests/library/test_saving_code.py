"""A checkpoint with its code loads in a fresh process where the package cannot be imported."""

import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard

from modeling_blip2x import Blip2xForConditionalGeneration
from modeling_blip2x.saving_code_blip2x import save_with_code
from tests.helpers.tiny import batch, prompt, stage1, stage1_processor, stage2, stage2_processor

FRESH = """
import importlib.util, sys, torch
assert importlib.util.find_spec("modeling_blip2x") is None, "the package is importable here"
from PIL import Image
from transformers import {auto}, AutoProcessor
model = {auto}.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
given = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save({call}, sys.argv[3])
print(type(processor(images=Image.new("RGB", (40, 30)), text="a red dog", return_tensors="pt")).__name__)
"""


def run_without_package(script, folder, given, tmp_path):
    """What the script saves, run with a path that holds site-packages but not this project."""
    torch.save(given, tmp_path / "given.pt")
    (tmp_path / "script.py").write_text(script)
    hide = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        "sys.path = [p for p in sys.path if 'site-packages' in p or 'lib/python' in p or p.endswith('.zip')];"
        "sys.path_hooks = [h for h in sys.path_hooks if 'editable' not in repr(h).lower()];"
        f"sys.argv = ['x', {str(folder)!r}, {str(tmp_path / 'given.pt')!r}, {str(tmp_path / 'out.pt')!r}];"
        f"exec(open({str(tmp_path / 'script.py')!r}).read())"
    )
    command = [sys.executable, "-c", hide]
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "BatchFeature" in done.stdout
    return torch.load(tmp_path / "out.pt")


@pytest.mark.parametrize("language_model", ["opt", "llama", "t5"])
def test_generative_model_loads_without_the_package(language_model, tmp_path):
    model = stage2(language_model, std=0.5)
    save_with_code(model, stage2_processor(bos=language_model != "t5"), tmp_path / "model")
    given = prompt(model)
    script = FRESH.format(
        auto="AutoModelForImageTextToText", call="model.generate(**given, max_new_tokens=5, do_sample=False)"
    )
    ids = run_without_package(script, tmp_path / "model", given, tmp_path)
    assert torch.equal(ids, model.generate(**given, max_new_tokens=5, do_sample=False))


def test_stage1_model_loads_without_the_package(tmp_path):
    model = stage1().eval()
    save_with_code(model, stage1_processor(), tmp_path / "model")
    script = FRESH.format(auto="AutoModelForPreTraining", call="model(**given, negative_seed=0).loss")
    loss = run_without_package(script, tmp_path / "model", batch(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loss, model(**batch(), negative_seed=0).loss)


def test_the_model_card_of_the_source_comes_along_and_another_one_is_kept(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    stage2("opt").save_pretrained(source)
    model = Blip2xForConditionalGeneration.from_pretrained(source)
    save_with_code(model, stage2_processor(), target)  # no card, none made up
    assert not (target / "README.md").exists()
    card = "---\nlicense: mit\ndemo: {prompt: a picture of, turns: 0}\n---\n# Toy\n"
    (source / "README.md").write_text(card)
    save_with_code(model, stage2_processor(), target)
    assert ModelCard.load(target / "README.md").data.to_dict()["demo"] == {"prompt": "a picture of", "turns": 0}
    (target / "README.md").write_text("written by hand")
    save_with_code(model, stage2_processor(), target)
    save_with_code(model, stage2_processor(), source)
    assert (target / "README.md").read_text() == "written by hand"
    assert (source / "README.md").read_text() == card
