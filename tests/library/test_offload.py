"""Weights that accelerate keeps elsewhere until a module's forward: the same losses, scores and captions as in memory."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload

from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xForImageTextRetrieval, Blip2xForPreTraining
from modeling_blip2x.grad_cache_blip2x import chunked_backward
from tests.helpers.tiny import batch, prompt, stage1, stage2

CPU = torch.device("cpu")
QFORMER = [f"model.qformer.{name}" for name in ("embeddings", "layernorm", "dropout", "layers")]
HEADS = ["vision_projection", "text_projection", "itm_head", "itg_head", "temperature"]
IN_MEMORY = dict.fromkeys(["model.vision_model", "model.ln_vision", "model.query_tokens", *QFORMER, *HEADS], "cpu")
LOADED = {  # the options of from_pretrained
    "disk": {"device_map": {"": "disk"}},
    "auto": {"device_map": "auto", "max_memory": {"cpu": "100KB"}},
    "embeddings": {"device_map": IN_MEMORY | {"model.qformer.embeddings": "disk"}},
}


def offloaded(model, way, folder):
    """A copy of the model with its weights offloaded in this way."""
    model.save_pretrained(folder)
    if way in LOADED:
        return type(model).from_pretrained(folder, offload_folder=folder / "offload", **LOADED[way]).eval()
    copy = type(model).from_pretrained(folder).eval()
    if way == "cpu_offload":
        return cpu_offload(copy, execution_device=CPU)
    return disk_offload(copy, folder / "offload", execution_device=CPU)


def lively(model):
    """Matrices large enough for captions to differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return model.eval()


@pytest.mark.parametrize("way", [*LOADED, "cpu_offload", "disk_offload"])
def test_stage1(way, tmp_path):
    model = lively(stage1())
    other = offloaded(model, way, tmp_path)
    assert other.get_input_embeddings().weight.is_meta
    inputs = batch()
    expected = model(**inputs, output_attentions=True)
    found = other(**inputs, output_attentions=True)
    for name in ("loss", "loss_itc", "loss_itm", "loss_itg", "logits_per_image", "temperature"):
        assert torch.allclose(found[name], expected[name], atol=1e-5), name
    assert torch.allclose(found.vision_outputs.attentions[-1], expected.vision_outputs.attentions[-1], atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(other.itm_scores(**inputs, grid=True), model.itm_scores(**inputs, grid=True), atol=1e-5)
    for options in ({}, {"num_beams": 3}):
        captions = model.generate(inputs["pixel_values"], max_new_tokens=5, **options)
        assert len({tuple(row) for row in captions.tolist()}) > 1
        assert torch.equal(other.generate(inputs["pixel_values"], max_new_tokens=5, **options), captions)


@pytest.mark.parametrize("way", [*LOADED, "cpu_offload"])
def test_stage1_in_chunks(way, tmp_path):
    model = stage1()
    other = offloaded(model, way, tmp_path)
    other.freeze_unimodal()
    inputs = batch() | {"chunk_size": 3, "negative_seed": 0}
    expected, found = chunked_backward(model.eval(), **inputs), chunked_backward(other.eval(), **inputs)
    for name in ("loss", "loss_itc", "loss_itm", "loss_itg", "temperature"):
        assert torch.allclose(found[name], expected[name], atol=1e-5), name
    if way == "embeddings":  # what is in memory is trained; gradients of offloaded weights go with their copies
        trained = dict(other.named_parameters())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not trained[name].is_meta:
                assert torch.allclose(trained[name].grad, parameter.grad, atol=1e-5), name


@pytest.mark.parametrize("way", LOADED)
@torch.no_grad()
def test_retrieval(way, tmp_path):
    lively(stage1()).save_pretrained(tmp_path)
    model = Blip2xForImageTextRetrieval.from_pretrained(tmp_path).eval()
    other = offloaded(model, way, tmp_path)
    for options in ({}, {"return_loss": True}):
        expected, found = model(**batch(), **options), other(**batch(), **options)
        assert torch.allclose(found.logits_per_image, expected.logits_per_image, atol=1e-5)
        assert found.loss is expected.loss is None or torch.allclose(found.loss, expected.loss, atol=1e-5)


@pytest.mark.parametrize("way", ["disk", "cpu_offload"])
@torch.no_grad()
def test_queries_that_read_a_question(way, tmp_path):
    model = stage2("opt", std=0.3)
    other = offloaded(model, way, tmp_path)
    images = prompt(model)["pixel_values"]
    question = torch.tensor([[2, 9, 3], [2, 8, 3]])
    expected = model.get_image_features(images, qformer_input_ids=question).pooler_output
    found = other.get_image_features(images, qformer_input_ids=question).pooler_output
    assert isinstance(other, Blip2xForConditionalGeneration) and torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(model.get_image_features(images).pooler_output, expected, atol=1e-2)


def test_a_frozen_tower_on_disk_beside_a_trained_qformer(tmp_path):
    model = stage1()
    model.save_pretrained(tmp_path)
    where = IN_MEMORY | {"model.vision_model": "disk"}
    other = Blip2xForPreTraining.from_pretrained(tmp_path, device_map=where, offload_folder=tmp_path / "offload")
    other.freeze_unimodal()
    for each in (model.eval(), other.eval()):
        each(**batch()).loss.backward()
    trained = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(trained[name].grad, parameter.grad, atol=1e-5), name
