"""Checkpoints to transformers and to LAVIS, and back; memory and files of a conversion."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    InstructBlipForConditionalGeneration,
)

from modeling_blip2x.convert import convert
from modeling_blip2x.weight_files_blip2x import Weight, write_folder
from tests.helpers.golden import Golden
from tests.helpers.official_checkpoints import golden_config, their_config, write_official
from tests.helpers.tiny import QUERIES, batch, image_processor, llm_tokenizer, prompt, stage1, stage2


def same_file(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("language_model, reads_text", [("opt", False), ("t5", False), ("llama", True)])
@torch.no_grad()
def test_export_to_transformers_and_back(language_model, reads_text, tmp_path):
    changes = {"qformer": {"use_qformer_text_input": reads_text}, "vision_layer_norm_eps": 1e-6}
    ours = stage2(language_model, "eva", std=0.3, **changes)
    ours.save_pretrained(tmp_path / "ours")
    assert convert(str(tmp_path / "ours"), str(tmp_path / "theirs"), to="transformers")[:-1] == []
    their_class = InstructBlipForConditionalGeneration if reads_text else Blip2ForConditionalGeneration
    theirs = their_class.from_pretrained(tmp_path / "theirs").eval()
    given = prompt(ours)
    if language_model == "t5":
        given["decoder_input_ids"] = given["input_ids"][:, :3] * 0
    if reads_text:
        given["qformer_input_ids"] = torch.tensor([[5, 6, 7], [8, 9, 10]])
        given["qformer_attention_mask"] = torch.ones(2, 3, dtype=torch.long)
    assert torch.allclose(theirs(**given).logits, ours(**given).logits, atol=1e-5)
    convert(str(tmp_path / "theirs"), str(tmp_path / "again"))
    assert same_file(tmp_path / "ours", tmp_path / "again")


@torch.no_grad()
def test_stage1_export_says_what_transformers_cannot_hold(tmp_path):
    ours = stage1("eva").eval()
    ours.save_pretrained(tmp_path / "ours")
    notes = convert(str(tmp_path / "ours"), str(tmp_path / "theirs"), to="transformers")
    assert any("temperature is lost" in n for n in notes) and any("ITG head is lost" in n for n in notes)
    assert any("epsilon" in n for n in notes)
    theirs = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "theirs").eval()
    expected = theirs(**batch(3), use_image_text_matching_head=True).logits_per_image
    assert torch.allclose(ours.itm_logits(**batch(3)), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["stage1", "stage2_opt", "stage2_t5"])
def test_lavis_and_back_is_bit_equal(name, tmp_path):
    write_official(name, tmp_path / "lavis.pth")
    convert(str(tmp_path / "lavis.pth"), str(tmp_path / "ours"), config=golden_config(name))
    assert convert(str(tmp_path / "ours"), str(tmp_path / "again.pth"), to="lavis") == []
    official = {n: t for n, t in Golden(name).official.items() if not n.endswith("position_ids")}
    again = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    assert again.keys() == official.keys()
    assert all(torch.equal(again[n], official[n]) for n in official)
    own_config = json.loads((tmp_path / "ours" / "config.json").read_text())
    convert(str(tmp_path / "again.pth"), str(tmp_path / "third"), config=own_config)
    assert same_file(tmp_path / "ours", tmp_path / "third")


@pytest.mark.parametrize("to, out", [("transformers", "out"), ("lavis", "out.pth")])
def test_what_a_target_cannot_hold_is_an_error(to, out, tmp_path):
    stage2("opt", "clip").save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="tower is a clip_vision_model, but .* only BLIP-2's own EVA tower"):
        convert(str(tmp_path / "clip"), str(tmp_path / out), to=to)
    (tmp_path / "clip" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="LoRA adapter that is not merged"):
        convert(str(tmp_path / "clip"), str(tmp_path / out), to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]


def test_lavis_has_no_class_for_gpt2(tmp_path):
    stage2("gpt2", "eva").save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="LAVIS has no BLIP-2 class for a gpt2"):
        convert(str(tmp_path / "ours"), str(tmp_path / "out.pth"), to="lavis")


def test_processor_follows_both_ways(tmp_path):
    config = their_config(Blip2Config, "opt", "small")
    tokenizer = llm_tokenizer()
    theirs = Blip2Processor(image_processor(), tokenizer, num_query_tokens=QUERIES)
    config.image_token_index = theirs.tokenizer.convert_tokens_to_ids("<image>")
    Blip2ForConditionalGeneration(config).save_pretrained(tmp_path / "theirs")
    theirs.save_pretrained(tmp_path / "theirs")
    assert convert(str(tmp_path / "theirs"), str(tmp_path / "ours")) == []
    given = {"images": Image.new("RGB", (40, 30), "red"), "text": "a photo of", "return_tensors": "pt"}
    ours = AutoProcessor.from_pretrained(tmp_path / "ours")(**given)
    assert torch.equal(ours["input_ids"], theirs(**given)["input_ids"])
    assert torch.equal(ours["pixel_values"], theirs(**given)["pixel_values"])
    assert convert(str(tmp_path / "ours"), str(tmp_path / "back"), to="transformers") == []
    again = AutoProcessor.from_pretrained(tmp_path / "back")
    assert type(again) is Blip2Processor
    assert torch.equal(again(**given)["input_ids"], ours["input_ids"])


@pytest.mark.parametrize("language_model", ["t5", "llama"])
def test_instructblip_of_lavis_and_back(language_model, tmp_path):
    changes = {"qformer": {"use_qformer_text_input": True}}
    stage2(language_model, "eva", **changes).save_pretrained(tmp_path / "ours")
    convert(str(tmp_path / "ours"), str(tmp_path / "lavis.pth"), to="lavis")
    official = torch.load(tmp_path / "lavis.pth", weights_only=True)["model"]
    assert f"{'t5' if language_model == 't5' else 'llm'}_proj.weight" in official
    assert "Qformer.bert.embeddings.word_embeddings.weight" in official
    own_config = json.loads((tmp_path / "ours" / "config.json").read_text())
    convert(str(tmp_path / "lavis.pth"), str(tmp_path / "again"), config=own_config)
    assert same_file(tmp_path / "ours", tmp_path / "again")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_memory_stays_near_the_size_of_the_result(suffix, tmp_path):
    """A fresh process converts a file of 400 MB; its peak above that of the imports is at most 1.2 times the result."""
    official = dict(Golden("stage1").official)
    words = "Qformer.bert.embeddings.word_embeddings.weight"
    rows = 100_000_000 // official[words].shape[1]
    official[words] = torch.zeros(rows, official[words].shape[1])
    for copy in [n for n in official if "predictions.decoder" in n]:
        del official[copy]
    official["Qformer.cls.predictions.bias"] = torch.zeros(rows)
    torch.save(official, tmp_path / "lavis.pth") if suffix == ".pth" else save_file(
        official, tmp_path / "lavis.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(golden_config("stage1")))
    script = (
        "import resource, sys; from modeling_blip2x.convert import main\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); main(sys.argv[1:]); print(peak() - before)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / f"lavis{suffix}"), str(tmp_path / "ours")]
    done = subprocess.run([*command, "--config", str(tmp_path / "config.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "ours" / "model.safetensors").stat().st_size
    assert size > 4e8 and int(done.stdout.split()[-1]) <= 1.2 * size


def test_shards_are_read_as_one(tmp_path):
    model = stage2("opt", "eva")
    weights = {name: Weight.of(tensor) for name, tensor in model.state_dict().items()}
    model.config.save_pretrained(tmp_path)
    write_folder(tmp_path, weights, shard_bytes=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
