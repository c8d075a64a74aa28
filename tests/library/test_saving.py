"""Checkpoints: bit-equal round trips, safetensors only, and clear errors for broken ones."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoModelForZeroShotImageClassification,
)

from modeling_blip2x import Blip2xConfig, Blip2xForPreTraining, Blip2xModel, Blip2xQFormerConfig
from modeling_blip2x.qformer_blip2x import QFormer
from tests.helpers.tiny import LANGUAGE_MODELS, TOWERS, batch, config, prompt, stage1, stage2


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("tower", TOWERS)
def test_stage1_round_trip(tower, tmp_path):
    model = stage1(tower).eval()
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = AutoModelForPreTraining.from_pretrained(tmp_path).eval()
    assert type(again) is Blip2xForPreTraining and same_state(model, again)
    with torch.no_grad():
        assert torch.equal(model(**batch(), negative_seed=0).loss, again(**batch(), negative_seed=0).loss)


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_stage2_round_trip(language_model, tmp_path):
    model = stage2(language_model, std=0.5)
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert same_state(model, again)
    arguments = {**prompt(model), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**arguments), again.generate(**arguments))


def test_bare_model_and_retrieval_read_a_stage1_checkpoint(tmp_path):
    model = stage1().eval()
    model.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    assert type(bare) is Blip2xModel and same_state(model.model, bare)
    assert same_state(model, AutoModelForZeroShotImageClassification.from_pretrained(tmp_path))


def test_stage1_config_has_no_language_model_after_reload(tmp_path):
    config().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).text_config is None


@torch.no_grad()
def test_half_precision_loads(tmp_path):
    full = stage2("opt", std=0.1)
    full.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    expected = full(**prompt(full)).logits
    assert torch.allclose(model(**prompt(model)).logits.float(), expected, atol=0.02 * expected.abs().max().item())


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: 1 << 15])


def header_overwritten(folder):
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def emptied(folder):
    (folder / "model.safetensors").write_bytes(b"")


def reshaped(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["itm_head.weight"] = tensors["itm_head.weight"][:, :-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def config_cut_short(folder):
    file = folder / "config.json"
    file.write_text(file.read_text()[:100])


@pytest.mark.parametrize(
    "corrupt, error, message",
    [
        (cut_short, SafetensorError, "(?i)incomplete metadata|metadata.*incomplete|header"),
        (header_overwritten, SafetensorError, "(?i)header"),
        (emptied, SafetensorError, "(?i)header"),
        (reshaped, RuntimeError, "(?s)itm_head.weight.*MISMATCH|size mismatch|ignore_mismatched_sizes"),
        (config_cut_short, OSError, "config.json.*is not a valid JSON"),
    ],
)
def test_corrupt_checkpoint_is_an_error(corrupt, error, message, tmp_path):
    """Each kind by its own error; the folder, whole again, loads."""
    model = stage1()
    model.save_pretrained(tmp_path)
    corrupt(tmp_path)
    with pytest.raises(error, match=message):
        Blip2xForPreTraining.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert same_state(model, Blip2xForPreTraining.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Blip2xConfig(num_querry_tokens=3), "no field 'num_querry_tokens'. Did you mean num_query_tokens"),
        (lambda: Blip2xQFormerConfig(hidden_sise=3), "no field 'hidden_sise'. Did you mean hidden_size"),
        (lambda: Blip2xQFormerConfig(hidden_size=50), "hidden_size must be a multiple of num_attention_heads, but 50"),
        (
            lambda: QFormer(Blip2xQFormerConfig(vocab_size=10, bos_token_id=30522, encoder_hidden_size=8)),
            "bos_token_id .* is 30522, outside the vocabulary of 10",
        ),
        (lambda: Blip2xConfig(num_query_tokens=0), "num_query_tokens must be at least 1, got 0"),
    ],
)
def test_wrong_config_fields_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_field_of_a_saved_config_is_an_error(tmp_path):
    config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_querry_tokens": 3}))
    with pytest.raises(ValueError, match="num_querry_tokens"):
        AutoConfig.from_pretrained(tmp_path)
