"""Frozen parts held in bfloat16: what is cast, what a checkpoint says of it, and what comes back."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoModelForPreTraining

from blip2x_training.models.frozen_dtype import hold_frozen, refuse_unscaled_float16
from blip2x_training.models.lora import LoraCheckpoint, add_lora
from tests.helpers.tiny import batch, labels_of, prompt, stage1, stage2

HALF = torch.bfloat16


def dtypes(part: torch.nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for tensor in part.state_dict().values() if tensor.is_floating_point()}


def frozen_stage2(language_model: str = "llama"):
    model = stage2(language_model, std=0.1)
    model.freeze_unimodal()
    return model


@pytest.mark.parametrize("language_model", ["opt", "llama", "gpt2", "t5"])
def test_the_root_of_a_run_gives_the_same_logits(language_model, tmp_path):
    model = frozen_stage2(language_model)
    hold_frozen(model, None, bf16=True, features_cached=False)
    assert dtypes(model.language_model) == dtypes(model.model.vision_model) == {HALF}
    assert dtypes(model.model.qformer) == dtypes(model.language_projection) == {torch.float32}
    inputs = prompt(model)
    inputs["labels"] = labels_of(model, inputs)
    with torch.no_grad():
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype, name
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected)
    said = json.loads((tmp_path / "config.json").read_text())["part_dtypes"]
    assert said["language_model"] == said["vision_model"] == "bfloat16" and said["qformer"] == "float32"

    whole = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert dtypes(whole) == {torch.float32}
    whole.save_pretrained(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["part_dtypes"] is None


@pytest.mark.parametrize(
    ("tower", "language_model"), [(torch.float32, HALF), (HALF, torch.float32), (HALF, torch.float16)]
)
def test_any_mixture_comes_back(tower, language_model, tmp_path):
    """A tower in half precision was enough to bring the Q-Former back in it, and a float32 one to bring all back in it."""
    model = frozen_stage2()
    model.model.vision_model.to(tower)
    model.language_model.to(language_model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].double(), tensor.double()), name
    if torch.float16 not in (tower, language_model):
        assert dtypes(loaded.model.vision_model) == {tower} and dtypes(loaded.language_model) == {language_model}
    assert dtypes(loaded.model.qformer) == {torch.float32}


def test_stage1_and_what_stage2_makes_of_it(tmp_path):
    model = stage1().eval()
    hold_frozen(model, None, bf16=True, features_cached=False)
    with torch.no_grad():
        expected = model(**batch()).logits_per_image
    model.save_pretrained(tmp_path)
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).logits_per_image, expected)
    assert loaded.temperature.dtype == torch.float32


def test_what_is_trained_or_does_not_run_is_left_alone():
    model = frozen_stage2()
    hold_frozen(model, None, bf16=False, features_cached=False)
    assert dtypes(model) == {torch.float32}
    hold_frozen(model, None, bf16=True, features_cached=True)
    assert dtypes(model.model.vision_model) == {torch.float32} and dtypes(model.language_model) == {HALF}
    hold_frozen(model, "float32", bf16=True, features_cached=False)
    assert dtypes(model) == {torch.float32}
    model.unfreeze_vision()
    hold_frozen(model, None, bf16=True, features_cached=False)
    assert dtypes(model.model.vision_model) == {torch.float32}


def test_an_adapter_stays_in_float32(tmp_path):
    """Also where the language model came in half precision: peft would give the adapter its dtype."""
    model = frozen_stage2()
    model.language_model.to(HALF)
    add_lora(model, "lm")
    hold_frozen(model, None, bf16=True, features_cached=False)
    for name, parameter in model.named_parameters():
        in_frozen = name.startswith(("language_model", "model.vision_model")) and "lora_" not in name
        assert parameter.dtype == (HALF if in_frozen else torch.float32), name
    inputs = prompt(model)
    model(**inputs, labels=labels_of(model, inputs)).loss.backward()
    LoraCheckpoint(model).save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert len(loaded.generate(**inputs, max_new_tokens=2)) == 2


def test_buffers_that_are_computed_keep_their_digits():
    model = frozen_stage2("llama")
    frequencies = model.language_model.model.rotary_emb.inv_freq.clone()
    hold_frozen(model, None, bf16=True, features_cached=False)
    assert torch.equal(model.language_model.model.rotary_emb.inv_freq, frequencies)


def test_batch_norms_in_half_precision_run():
    model = stage1("mobilenet").eval()
    with torch.no_grad():
        expected = model.model.get_vision_embeds(batch()["pixel_values"])
        hold_frozen(model, None, bf16=True, features_cached=False)
        found = model.model.get_vision_embeds(batch()["pixel_values"])
    assert torch.allclose(found.float(), expected, atol=0.1 * expected.abs().max().item())


def test_float16_without_scaling_is_refused():
    model = frozen_stage2("opt")
    model.language_model.to(torch.float16)
    with pytest.raises(
        ValueError, match=r"in float16, and nothing scales the loss.*--bf16 true, --fp16 true, or --frozen_dtype"
    ):
        refuse_unscaled_float16(model, bf16=False, fp16=False)
    refuse_unscaled_float16(model, bf16=False, fp16=True)
    hold_frozen(model, "float32", bf16=False, features_cached=False)
    refuse_unscaled_float16(model, bf16=False, fp16=False)
