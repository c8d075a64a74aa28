"""The Space in a new environment that holds what its requirements name and nothing else, with a checkpoint that carries its code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_blip2x.saving_code_blip2x import save_with_code
from tests.helpers.space_server import EXAMPLES, SPACE, WAIT, clean_environment, copy_of_the_app, save_tiny, serving

pytestmark = pytest.mark.releases
ROOT = SPACE.parent


@pytest.fixture(scope="module")
def space_python(tmp_path_factory) -> Path:
    """The interpreter of an environment made as a Space makes it: gradio of sdk_version and requirements.txt.

    PIP_CONSTRAINT keeps torch to one CPU build, as `make test-latest` sets it; TRY is what it was told to try.
    """
    environment = tmp_path_factory.mktemp("space") / "environment"
    gradio = re.search(r"^sdk_version: (.+)$", (SPACE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    pinned = {"PIP_CONSTRAINT": str(ROOT / "constraints-latest.txt"), **os.environ}
    install(pinned, *pip, f"gradio=={gradio}", "--requirement", str(SPACE / "requirements.txt"))
    if os.environ.get("TRY"):
        install(pinned, *pip, *os.environ["TRY"].split())
    return python


def install(environment: dict[str, str], *command: str) -> None:
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}"


def test_one_request(space_python, tmp_path):
    """The caption over HTTP is the one that the model writes here."""
    folder, _ = save_tiny(tmp_path / "trained")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    save_with_code(model, processor, tmp_path / "carried")
    inputs = processor(images=Image.open(EXAMPLES[1]).convert("RGB"), text="a photo of", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8, min_new_tokens=1, do_sample=False)
    expected = processor.batch_decode_new(ids, inputs["input_ids"])[0]

    script = copy_of_the_app(tmp_path) / "app.py"
    env = clean_environment(HF_HOME=str(tmp_path / "hf"), BLIP2X_MODEL=str(tmp_path / "carried"))
    env.pop("PYTHONPATH", None)
    log = tmp_path / "log"
    with serving(script=script, env=env, log=log, cwd=tmp_path, python=space_python) as (address, _):
        assert caption(address, EXAMPLES[1], "a photo of", longest=8) == expected != ""
    assert "Traceback" not in log.read_text()


def caption(address: str, picture: Path, prompt: str, longest: int) -> str:
    """What /caption answers, greedily, by Gradio's HTTP interface: upload, call, and the last event of its stream."""
    api = f"{address}/gradio_api"
    upload = requests.post(f"{api}/upload", files={"files": (picture.name, picture.read_bytes())}, timeout=WAIT)
    file = {"path": upload.json()[0], "meta": {"_type": "gradio.FileData"}}
    settings = ["beam", 1, 1, 0.9, 1, longest, 1, 1, 0, 1]
    call = requests.post(f"{api}/call/caption", json={"data": [file, prompt, *settings]}, timeout=WAIT)
    told = requests.get(f"{api}/call/caption/{call.json()['event_id']}", timeout=WAIT).text
    assert "event: complete" in told, told
    return json.loads(told.split("event: complete\ndata: ")[1].splitlines()[0])[0]
