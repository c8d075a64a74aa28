"""Number formats and image sizes: halves, a dtype for each part, positions interpolated."""

import pytest
import torch
from tiny import TOWERS, batch, config, prompt, stage1, stage2
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from modeling_blip2x import Blip2xForConditionalGeneration

SIZES = [(42, 42), (28, 56)]
INTERPOLATES = [tower for tower in TOWERS if tower != "mobilenet"]  # a CNN takes any size as it is


def labelled(model, inputs):
    labels = inputs["input_ids"].clone()
    return inputs | {"labels": labels.masked_fill(labels == model.config.image_token_index, -100)}


@pytest.mark.parametrize("language_model", ["opt", "llama", "t5"])
@torch.no_grad()
def test_bfloat16_is_close_to_float32(language_model, tmp_path):
    model = stage2(language_model, std=0.1)
    inputs = labelled(model, prompt(model))
    expected = model(**inputs).loss
    model.save_pretrained(tmp_path)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half(**inputs).loss.item() == pytest.approx(expected.item(), rel=0.03)


@pytest.mark.parametrize("language_model", ["opt", "llama", "t5"])
@pytest.mark.parametrize("frozen", [torch.bfloat16, torch.float16])
def test_halves_around_a_float32_qformer(frozen, language_model):
    """What training on a GPU does: frozen parts in half precision, the trained part in full; gradients are finite."""
    model = stage2(language_model, std=0.1, qformer={"use_qformer_text_input": False})
    expected = model(**labelled(model, prompt(model))).loss.item()
    model.freeze_unimodal()
    model.model.vision_model.to(frozen)
    model.language_model.to(frozen)
    assert model.model.qformer.layernorm.weight.dtype == torch.float32
    loss = model(**labelled(model, prompt(model))).loss
    assert loss.item() == pytest.approx(expected, rel=0.03)
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in trained)


def test_a_dtype_for_each_part():
    """By `.to` on the parts: transformers takes no dictionary of dtypes any more."""
    model = stage2("opt")
    model.language_model.to(torch.bfloat16)
    model.model.vision_model.to(torch.float16)
    assert model.model.ln_vision.weight.dtype == model.language_projection.weight.dtype == torch.float32
    assert len(model.generate(**prompt(model), max_new_tokens=3)) == 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tower", INTERPOLATES)
@torch.no_grad()
def test_other_image_sizes_in_both_stages(tower, size):
    """Fine-tuning needs 364 and 490 where pre-training had 224; square or not."""
    pixels = torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(0))
    first = stage1(tower).eval()
    inputs = batch(4) | {"pixel_values": pixels}
    assert torch.isfinite(first(**inputs, negative_seed=0, interpolate_pos_encoding=True).loss)
    second = stage2("opt", tower, std=0.3)
    inputs = prompt(second, rows=4) | {"pixel_values": pixels}
    logits = second(**inputs, interpolate_pos_encoding=True).logits
    assert torch.isfinite(logits).all()
    assert len(second.generate(**inputs, interpolate_pos_encoding=True, max_new_tokens=2)) == 4


def test_a_wrong_size_without_interpolation_is_an_error():
    model = stage2("opt", "clip")
    with pytest.raises(ValueError, match="(?i)image size.*28"):
        model(**prompt(model) | {"pixel_values": torch.zeros(2, 3, 42, 42)})


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_language_model(bits, tmp_path):
    """On a GPU where there is one; bitsandbytes computes on a CPU too."""
    shape = config("clip", "opt")
    shape.text_config.hidden_size = shape.text_config.word_embed_proj_dim = 64  # blocks of 4-bit numbers are of 64
    torch.manual_seed(0)
    plain = Blip2xForConditionalGeneration(shape).eval()
    plain.save_pretrained(tmp_path)
    skipped = ["model.vision_model", "model.qformer", "language_projection", "lm_head"]
    quantisation = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=skipped)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=quantisation, device_map=device)
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.startswith("language_model.")}
    assert ("Linear4bit" if bits == 4 else "Linear8bitLt") in kinds
    assert type(model.model.qformer.layers[0].attention.query) is torch.nn.Linear
    inputs = prompt(model)
    on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
    logits = torch.stack([plain(**inputs).logits.flatten(), model(**on_device).logits.float().cpu().flatten()])
    assert torch.corrcoef(logits)[0, 1] > (0.9 if bits == 4 else 0.99)
    assert len(model.generate(**on_device, max_new_tokens=3)) == 2
