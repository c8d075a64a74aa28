"""LoRA presets: exactly the named layers, nothing else; adapters save, load and merge to the same numbers."""

import re

import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText

from modeling_blip2x.lora_blip2x import lora_config, lora_targets
from tests.helpers.tiny import prompt, stage1, stage2

LM = {
    "opt": "language_model.model.decoder.layers.{}.",
    "llama": "language_model.model.layers.{}.",
}
LM_LAYERS = {
    "opt": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"],
    "llama": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    + ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
}
T5_ATTENTION = ["q", "k", "v", "o"]
QFORMER = ["attention.query", "attention.key", "attention.value", "attention.dense"]
QFORMER += ["query_feed_forward.up", "query_feed_forward.down"]
CROSS = ["crossattention.query", "crossattention.key", "crossattention.value", "crossattention.dense"]
CLIP = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]


def expected(preset, language_model):
    """Names of the layers a preset means, for the tiny models: 2 LLM and tower layers, 4 Q-Former layers."""
    if preset == "vision":
        return {f"model.vision_model.encoder.layers.{i}.{name}" for i in range(2) for name in CLIP}
    if preset == "qformer":
        names = {f"model.qformer.layers.{i}.{name}" for i in range(4) for name in QFORMER}
        return names | {f"model.qformer.layers.{i}.{name}" for i in (0, 2) for name in CROSS}
    if language_model == "t5":
        block = "language_model.{}.block.{}.layer.{}."
        attention = [
            ("encoder", 0, "SelfAttention"),
            ("decoder", 0, "SelfAttention"),
            ("decoder", 1, "EncDecAttention"),
        ]
        names = {block.format(s, i, n) + f"{k}.{p}" for s, n, k in attention for i in range(2) for p in T5_ATTENTION}
        ffn = [("encoder", 1), ("decoder", 2)]
        return names | {
            block.format(s, i, n) + f"DenseReluDense.{w}" for s, n in ffn for i in range(2) for w in ("wi", "wo")
        }
    return {LM[language_model].format(i) + name for i in range(2) for name in LM_LAYERS[language_model]}


def model_of(language_model):
    return stage2(language_model, std=0.3, qformer={"use_qformer_text_input": False})


@pytest.mark.parametrize("language_model", ["opt", "t5", "llama"])
@pytest.mark.parametrize("preset", ["lm", "qformer", "vision"])
def test_a_preset_is_exactly_these_layers(preset, language_model):
    model = model_of(language_model)
    model.freeze_unimodal()
    adapted = peft.get_peft_model(model, lora_config(model, preset))
    layers = {name.removeprefix("base_model.model.") for name, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert layers == expected(preset, language_model)
    trained = {name.removeprefix("base_model.model.") for name, p in adapted.named_parameters() if p.requires_grad}
    others = {name for name in trained if "lora_" not in name}
    assert others == {
        "model.query_tokens.modules_to_save.default.weight",
        "language_projection.modules_to_save.default.weight",
        "language_projection.modules_to_save.default.bias",
    }


@pytest.mark.parametrize("language_model", ["opt", "t5", "llama"])
@torch.no_grad()
def test_adapter_saves_loads_and_merges_to_the_same_numbers(language_model, tmp_path):
    base = model_of(language_model)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base").eval()  # PEFT notes where it came from
    given = prompt(base)
    if language_model == "t5":
        given["decoder_input_ids"] = given["input_ids"][:, :3] * 0
    before = base(**given).logits
    adapted = peft.get_peft_model(base, lora_config(base, "lm")).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    expected_logits = adapted(**given).logits
    assert not torch.allclose(before, expected_logits, atol=1e-2)
    adapted.save_pretrained(tmp_path / "adapter")

    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter").eval()
    assert torch.allclose(loaded(**given).logits, expected_logits, atol=1e-5)
    again = peft.PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert torch.allclose(again.eval()(**given).logits, expected_logits, atol=1e-5)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(merged(**given).logits, expected_logits, atol=1e-5)


def test_a_regular_expression_and_what_matches_nothing():
    model = model_of("opt")
    only = r"language_model\..*\.q_proj"
    assert lora_targets(model, only) == only
    with pytest.raises(ValueError, match="No linear layer of the model matches 'q_prog'. Choose lm, qformer, vision"):
        lora_targets(model, "q_prog")
    with pytest.raises(ValueError, match="no linear layer in language_model"):
        lora_targets(stage1(), "lm")
    assert re.fullmatch(lora_targets(model, "lm"), "language_model.lm_head") is None


@pytest.mark.parametrize("pattern, says", [("(", "not a regular expression"), (r"((\w|\.)+)+!", "takes more than")])
def test_an_expression_that_is_none_or_never_ends(pattern, says):
    with pytest.raises(ValueError, match=says):
        lora_targets(model_of("opt"), pattern)
