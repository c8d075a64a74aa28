"""Where the queries look: `query_attention`, and its drawing over the picture."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2WithRegistersConfig

from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xProcessor
from modeling_blip2x.attention_maps_blip2x import grid_of
from tests.helpers import tiny

REGISTERS = Dinov2WithRegistersConfig(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=tiny.SIZE,
    patch_size=tiny.PATCH,
    num_register_tokens=4,
)


def weights_by_hand(model, pixels, **read) -> torch.Tensor:
    """Softmax of (query projection of what enters each cross-attention) @ keys of the image: (layers, B, heads, Q, N)."""
    shared, found = model.shared_model, []

    def keep(module, given, _):
        hidden, (keys, _values) = given[0], given[1]
        heads = module.query(hidden).unflatten(-1, (4, -1)).transpose(1, 2)
        found.append((heads @ keys.transpose(-1, -2) / keys.shape[-1] ** 0.5).softmax(-1))

    hooks = [
        layer.crossattention.register_forward_hook(keep) for layer in shared.qformer.layers if layer.crossattention
    ]
    with torch.no_grad():
        shared(pixels, **read)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


def normalised(weights: torch.Tensor) -> torch.Tensor:
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("tower, without_place", [("clip", 1), ("siglip", 0), ("registers", 5), ("mobilenet", 0)])
@pytest.mark.parametrize("stage", [1, 2])
def test_maps_equal_the_weights_computed_by_hand(monkeypatch, tower, without_place, stage):
    monkeypatch.setitem(tiny.TOWERS, "registers", REGISTERS)
    model = tiny.stage1(tower).eval() if stage == 1 else tiny.stage2("opt", tower)
    pixels = tiny.batch(2, size=64 if tower == "mobilenet" else tiny.SIZE)["pixel_values"]
    weights = weights_by_hand(model, pixels)[..., without_place:]
    assert weights.shape == (2, 2, 4, tiny.QUERIES, 4)
    maps = model.query_attention(pixels)
    assert maps.shape == (2, tiny.QUERIES, 2, 2)
    assert torch.allclose(maps.flatten(2), normalised(weights.mean((0, 2))), atol=1e-6)
    assert torch.allclose(maps.sum((2, 3)), torch.ones(2, tiny.QUERIES))
    one = model.query_attention(pixels, layer=2, head=3)
    assert torch.allclose(one.flatten(2), normalised(weights[1, :, 3]), atol=1e-6)
    embeds = model.shared_model.get_vision_embeds(pixels)
    from_features = model.query_attention(vision_embeds=embeds, image_size=pixels.shape[-2:], layer=2, head=3)
    assert torch.equal(from_features, one)


@pytest.mark.parametrize("tower, height, width, grid", [("clip", 28, 56, (2, 4)), ("mobilenet", 96, 160, (3, 5))])
def test_images_that_are_not_square(tower, height, width, grid):
    model = tiny.stage1(tower).eval()
    pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    maps = model.query_attention(pixels, interpolate_pos_encoding=True)
    model.config.interpolate_pos_encoding = True
    by_hand = normalised(weights_by_hand(model, pixels)[..., -grid[0] * grid[1] :].mean((0, 2)))
    assert torch.allclose(maps, by_hand.unflatten(-1, grid), atol=1e-6)


def test_queries_that_read_look_elsewhere_for_another_text():
    model = tiny.stage2("opt", std=0.3, qformer={"use_qformer_text_input": True})
    pixels = tiny.batch(2)["pixel_values"]
    read = {"qformer_input_ids": torch.tensor([[1, 7, 8], [1, 9, 0]])}
    read["qformer_attention_mask"] = (read["qformer_input_ids"] > 0).long()
    weights = normalised(weights_by_hand(model, pixels, **read)[..., 1:].mean((0, 2)))
    maps = model.query_attention(pixels, **read)
    assert torch.allclose(maps.flatten(2), weights, atol=1e-6)
    assert not torch.allclose(maps, model.query_attention(pixels), atol=1e-3)


def test_what_there_is_not_is_named():
    model = tiny.stage1().eval()
    pixels = tiny.batch(1)["pixel_values"]
    assert model.cross_attention_layers == [0, 2]
    with pytest.raises(ValueError, match=r"layer is 1, but the layers that look at the image are \[0, 2\]"):
        model.query_attention(pixels, layer=1)
    with pytest.raises(ValueError, match="head is 4, but there are 4 heads. Choose from 0 to 3"):
        model.query_attention(pixels, head=4)
    with pytest.raises(ValueError, match="gives 2 positions, which are no grid over an image of 28 x 28 pixels"):
        model.query_attention(vision_embeds=torch.randn(1, 2, 48), image_size=(28, 28))
    with pytest.raises(ValueError, match="got neither"):
        model.query_attention()


@pytest.mark.parametrize(
    "positions, height, width, patch, grid",
    [
        (257, 224, 224, 14, (16, 16)),
        (261, 224, 224, None, (16, 16)),  # class token and four registers
        (49, 224, 224, 4, (7, 7)),  # Swin merges the patches that it cuts
        (28, 56, 98, (14, 14), (4, 7)),
        (28, 224, 100, None, (7, 4)),  # a CNN of stride 32, rounded up
        (25, 42, 42, 14, (3, 3)),  # sixteen registers: without the patch size, a grid of 5 x 5
        (2, 14, 14, 14, (1, 1)),
    ],
)
def test_positions_become_a_grid(positions, height, width, patch, grid):
    assert grid_of(positions, height, width, patch) == grid


@pytest.mark.parametrize("do_rescale", [True, False])
def test_the_seen_picture_is_the_picture_after_resize_and_crop(do_rescale):
    levels = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
    processor = Blip2xProcessor(tiny.image_processor(), tiny.bert_tokenizer())
    processor.image_processor.size = {"shortest_edge": 40}
    processor.image_processor.do_center_crop, processor.image_processor.crop_size = True, {"height": 40, "width": 40}
    if not do_rescale:
        processor.image_processor.do_rescale = processor.image_processor.do_normalize = False
    seen = processor.seen_picture(Image.fromarray(levels), side=40)
    assert np.abs(np.asarray(seen).astype(int) - levels[:, 20:60]).max() <= 1
    assert processor.seen_picture(Image.fromarray(levels), side=100).size == (100, 100)


def test_a_drawing_is_hot_where_the_map_is():
    black = Image.new("RGB", (100, 100), "black")
    heat = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    shown = Blip2xProcessor.draw_attention(black, heat)
    assert sum(shown.getpixel((5, 5))) > 3 * sum(shown.getpixel((95, 95)))
    # With a hottest value of its own a map is drawn by its shape; with a common one, half as strong is half as hot.
    assert Blip2xProcessor.draw_attention(black, heat / 2) == shown
    assert Blip2xProcessor.draw_attention(black, heat / 2, strongest=1.0).getpixel((5, 5)) < shown.getpixel((5, 5))


def test_the_generative_class_keeps_it_after_saving(tmp_path):
    model = tiny.stage2()
    model.save_pretrained(tmp_path)
    pixels = tiny.batch(1)["pixel_values"]
    loaded = Blip2xForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.query_attention(pixels), model.query_attention(pixels))
