"""Number formats and image sizes: halves, a dtype for each part, positions interpolated."""

import inspect

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoModelForPreTraining, BitsAndBytesConfig

from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xForPreTraining
from tests.helpers.tiny import LANGUAGE_MODELS, PATCH, TOWERS, batch, config, prompt, stage1, stage2

SIZES = [(42, 42), (28, 56)]
INTERPOLATES = [tower for tower in TOWERS if tower != "mobilenet"]  # a CNN takes any size as it is


def agreement(found, expected):
    """Correlation of two tensors."""
    return torch.corrcoef(torch.stack([found.float().flatten(), expected.float().flatten()]))[0, 1].item()


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


@torch.no_grad()
def test_a_dtype_for_each_part():
    """By `.to` on the parts: transformers takes no dictionary of dtypes any more."""
    model = stage2("opt", std=0.1)
    inputs = prompt(model)
    expected = model(**inputs).logits
    model.language_model.to(torch.bfloat16)
    model.model.vision_model.to(torch.float16)
    assert model.model.ln_vision.weight.dtype == model.language_projection.weight.dtype == torch.float32
    assert agreement(model(**inputs).logits, expected) > 0.999
    assert len(model.generate(**inputs, max_new_tokens=3)) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_stage1_in_half_precision_is_close_to_float32(dtype, tmp_path):
    model = stage1().eval()
    expected, scores = model(**batch()), model.itm_logits(**batch())
    model.save_pretrained(tmp_path)
    half = AutoModelForPreTraining.from_pretrained(tmp_path, dtype=dtype).eval()
    found = half(**batch())
    for name in ("loss_itc", "loss_itm", "loss_itg"):
        assert found[name].item() == pytest.approx(expected[name].item(), rel=0.02), name
    assert torch.allclose(found.logits_per_image, expected.logits_per_image, atol=0.1)
    assert torch.allclose(half.itm_logits(**batch()).float(), scores, atol=0.02)


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_queries_that_read_a_question_in_half_precision(dtype, language_model, tmp_path):
    """T5's list of modules to keep in float32 ("wo") catches the Q-Former's word embeddings too."""
    model = stage2(language_model, std=0.1)
    inputs = prompt(model) | {"qformer_input_ids": torch.tensor([[2, 9, 3], [2, 8, 3]])}
    if language_model == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, -3:]
    model.save_pretrained(tmp_path)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=dtype).eval()
    assert agreement(half(**inputs).logits, model(**inputs).logits) > 0.999
    without = {name: tensor for name, tensor in inputs.items() if name != "qformer_input_ids"}
    assert agreement(model(**without).logits, model(**inputs).logits) < 0.999


@pytest.mark.parametrize(
    "part", ["language_projection", "model.query_tokens", "model.qformer.embeddings", "model.ln_vision"]
)
@torch.no_grad()
def test_one_part_in_float32_in_a_model_of_halves(part):
    """Adapters' copies (PEFT's modules_to_save), or a user's own choice."""
    model = stage2("opt", std=0.1)
    inputs = prompt(model) | {"qformer_input_ids": torch.tensor([[2, 9, 3], [2, 8, 3]])}
    expected = model(**inputs).logits
    model.to(torch.bfloat16)
    model.get_submodule(part).float()
    if part == "model.ln_vision":
        model.model.qformer.float()  # its output goes there
    assert agreement(model(**inputs).logits, expected) > 0.999


def interpolated(tower, pixels):
    """What the tower itself makes of another image size, without this package."""
    takes = "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
    return tower(pixels, **({"interpolate_pos_encoding": True} if takes else {})).last_hidden_state


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tower", INTERPOLATES)
@torch.no_grad()
def test_other_image_sizes_in_both_stages(tower, size):
    """Fine-tuning needs 364 and 490 where pre-training had 224; square or not: the features of the tower, interpolated."""
    pixels = torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(0))
    first = stage1(tower).eval()
    features = interpolated(first.model.vision_model, pixels)
    positions = size[0] // PATCH * (size[1] // PATCH)
    assert features.shape[1] - positions in (0, 1), "patches, and a class token"
    inputs = batch(4) | {"pixel_values": pixels}
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    found = first(**inputs, negative_seed=0, interpolate_pos_encoding=True)
    expected = first(vision_embeds=features, **texts, negative_seed=0)
    assert torch.allclose(found.loss, expected.loss, atol=1e-5)
    assert torch.allclose(found.logits_per_image, expected.logits_per_image, atol=1e-5)

    second = stage2("opt", tower, std=0.3)
    features = interpolated(second.model.vision_model, pixels)
    text = {name: tensor for name, tensor in prompt(second, rows=4).items() if name != "pixel_values"}
    found = second(pixel_values=pixels, **text, interpolate_pos_encoding=True).logits
    assert torch.allclose(found, second(vision_embeds=features, **text).logits, atol=1e-4)
    answers = second.generate(pixel_values=pixels, **text, interpolate_pos_encoding=True, max_new_tokens=3)
    assert torch.equal(answers, second.generate(vision_embeds=features, **text, max_new_tokens=3))
    turned = second(pixel_values=pixels.flip(-1), **text, interpolate_pos_encoding=True).logits
    assert not torch.allclose(found, turned, atol=1e-2)


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


def wide(language_model):
    """A model whose every matrix is a whole number of the blocks of 64 that 4-bit kernels read; None is stage 1."""
    shape = config(
        "clip", language_model, qformer={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    )
    shape.vision_config.hidden_size, shape.vision_config.intermediate_size = 64, 128
    shape.qformer_config.encoder_hidden_size = 64
    changes = {
        "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128},
        "llama": {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 16},
        "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128},
    }
    for name, value in changes.get(language_model, {}).items():
        setattr(shape.text_config, name, value)
    torch.manual_seed(0)
    model = (Blip2xForPreTraining if language_model is None else Blip2xForConditionalGeneration)(shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("dtype", ["auto", torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("language_model", ["opt", "llama", "t5", None])
@torch.no_grad()
def test_quantised_as_it_comes(language_model, bits, dtype, tmp_path):
    """Without a list of what to skip: tower, Q-Former and language model are packed, and so were inputs cast to bytes."""
    model = wide(language_model)
    model.save_pretrained(tmp_path)
    kind = {"bnb_4bit_quant_type": "nf4"} if bits == 4 else {}
    options = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **kind)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed = type(model).from_pretrained(tmp_path, quantization_config=options, device_map=device, dtype=dtype).eval()
    assert packed.model.qformer.layers[0].attention.query.weight.dtype in (torch.uint8, torch.int8)
    least = 0.97 if bits == 4 else 0.999
    inputs = batch(2) if language_model is None else prompt(model)
    reading = {} if language_model is None else {"qformer_input_ids": torch.tensor([[2, 9, 3], [2, 8, 3]])}
    for options in ({}, reading):
        expected = model.get_image_features(inputs["pixel_values"], **options).pooler_output
        there = {name: tensor.to(device) for name, tensor in options.items()}
        found = packed.get_image_features(inputs["pixel_values"].to(device), **there).pooler_output
        assert agreement(found.cpu(), expected) > least
    there = {name: tensor.to(device) for name, tensor in (inputs | reading).items()}
    if language_model is None:
        assert packed(**there).loss.item() == pytest.approx(model(**inputs).loss.item(), rel=0.05)
        assert packed.generate(there["pixel_values"], max_new_tokens=3).shape[0] == 2
        assert torch.allclose(packed.itm_scores(**there).float().cpu(), model.itm_scores(**inputs), atol=0.1)
    else:
        assert packed.generate(**there, max_new_tokens=3).shape[0] == 2
