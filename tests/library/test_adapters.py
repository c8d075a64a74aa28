"""Modules that PEFT has wrapped: nothing reads an attribute off a submodule that a wrapper lacks."""

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, TrainableTokensConfig, get_peft_model

from tests.helpers.tiny import batch, prompt, stage1, stage2

HEADS = ["vision_projection", "text_projection", "itm_head"]
STAGE1 = {
    "ln_vision": LNTuningConfig(target_modules=["ln_vision"]),
    "all layernorms": LNTuningConfig(target_modules=["ln_vision", "layernorm"]),
    "LoRA of the heads": LoraConfig(target_modules=[*HEADS, "itg_head.dense"], init_lora_weights=False),
    "LoRA of the word embeddings": LoraConfig(target_modules=["word_embeddings"], init_lora_weights=False),
    "LoRA of the positions": LoraConfig(target_modules=["position_embeddings", "query"], init_lora_weights=False),
    "some words": TrainableTokensConfig(target_modules=["word_embeddings"], token_indices=[3, 4], init_weights=False),
    "IA3": IA3Config(target_modules=["key", "value"], feedforward_modules=[], init_ia3_weights=False),
    "whole parts": LoraConfig(
        target_modules=["query"],
        modules_to_save=["query_tokens", "ln_vision", "itg_head", "word_embeddings", *HEADS],
        init_lora_weights=False,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", STAGE1)
def test_stage1(kind, dtype):
    """Trains; and merged it computes what it did, so its ITG head reads the adapted words as well."""
    before = stage1().eval()(**batch()).loss.item()
    wrapped = get_peft_model(stage1().to(dtype), STAGE1[kind]).eval()
    wrapped(**batch()).loss.backward()
    trained = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    unused = [name for name, parameter in trained.items() if parameter.grad is None]
    assert trained and all("vision_model" in name for name in unused), unused
    torch.optim.Adam(trained.values(), lr=0.3, eps=1e-12).step()
    with torch.no_grad():
        adapted = wrapped(**batch()).loss.item()
        captions = wrapped.base_model.generate(pixel_values=batch()["pixel_values"], max_new_tokens=4)
        scores = wrapped.base_model.model.itm_scores(**batch(), grid=True)
        assert adapted != pytest.approx(before, abs=1e-5)
        merged = wrapped.merge_and_unload()
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        assert merged(**batch()).loss.item() == pytest.approx(adapted, abs=tolerance)
        assert torch.allclose(merged.itm_scores(**batch(), grid=True), scores, atol=tolerance)
        if dtype == torch.float32:
            assert torch.equal(merged.generate(batch()["pixel_values"], max_new_tokens=4), captions)


STAGE2 = {
    "ln_vision": LNTuningConfig(target_modules=["ln_vision"]),
    "projection": LoraConfig(target_modules=["language_projection"], init_lora_weights=False),
    "whole parts": LoraConfig(target_modules=["q_proj"], modules_to_save=["language_projection", "query_tokens"]),
    "the whole Q-Former": LoraConfig(target_modules=["q_proj"], modules_to_save=["qformer"]),
    "the whole tower": LoraConfig(target_modules=["fc1"], modules_to_save=["vision_model"]),
    "all linear layers": LoraConfig(target_modules="all-linear", init_lora_weights=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", STAGE2)
def test_image_features_of_stage2(kind, dtype):
    model = stage2("opt", std=0.1)
    pixels = prompt(model)["pixel_values"]
    question = torch.tensor([[2, 9, 3], [2, 8, 3]])
    wrapped = get_peft_model(model.to(dtype), STAGE2[kind]).eval()
    output = wrapped.get_image_features(pixels, qformer_input_ids=question, output_attentions=True)
    assert len(output.attentions) == 2 and output.attentions[0].shape[1] == 4
    output.pooler_output.float().square().sum().backward()
    trained = [p for name, p in wrapped.named_parameters() if p.requires_grad and "language_model" not in name]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    with torch.no_grad():
        merged = wrapped.merge_and_unload()
        found = merged.get_image_features(pixels, qformer_input_ids=question).pooler_output
        assert torch.allclose(found.float(), output.pooler_output.float(), rtol=0.02, atol=0.02)


@torch.no_grad()
def test_a_tower_that_is_a_peft_model_itself():
    model = stage2("opt", std=0.1)
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    expected = model.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
    adapter = LoraConfig(target_modules=["q_proj"])  # starts as no change
    model.model.vision_model = get_peft_model(model.model.vision_model, adapter).eval()
    found = model.get_image_features(pixels, interpolate_pos_encoding=True, output_attentions=True)
    assert torch.allclose(found.pooler_output, expected, atol=1e-4) and len(found.attentions) == 2
