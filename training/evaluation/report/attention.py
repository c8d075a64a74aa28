"""Where the queries look: their cross-attention over the patches of one image."""

import numpy as np
import torch
from PIL import Image

from modeling_blip2x.images_blip2x import rgb_image

from ...data.collators import collate_images, collate_prompts
from ..evaluated_model import Checkpoint

SPECIAL = 16  # tokens without a place (class, registers) that a tower may have at most


@torch.no_grad()
def query_maps(checkpoint: Checkpoint, item: dict) -> np.ndarray | None:
    """(Q, rows, columns), mean over layers and heads, each query's sum 1; None where positions are no grid."""
    model, processor = checkpoint.model, checkpoint.processor
    pixels = collate_images([item], processor.image_processor, False)["pixel_values"].to(model.device)
    read = {}
    if checkpoint.stage == 2:
        longest = checkpoint.language_collator().max_text_length
        read = collate_prompts([item], processor.qformer_tokenizer, longest)
        read = {name: value.to(model.device) for name, value in read.items()}
    features = model.get_image_features(pixels, output_attentions=True, **read)
    weights = torch.stack([layer for layer in features.qformer_outputs.cross_attentions if layer is not None])
    weights = weights[:, 0].float().mean(dim=(0, 1)).cpu()[: model.config.num_query_tokens]  # (Q, N)
    grid = grid_of(weights.shape[-1], *pixels.shape[-2:])
    if grid is None:
        return None
    places = weights[:, -grid[0] * grid[1] :]  # tokens without a place come first
    return (places / places.sum(-1, keepdim=True).clamp(min=1e-12)).unflatten(-1, grid).numpy()


def grid_of(positions: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of a tower's positions over an image of height x width pixels."""
    for places in range(positions, max(positions - SPECIAL - 1, 0), -1):
        rows = round((places * height / width) ** 0.5)
        if rows and places % rows == 0 and abs(rows * width - places // rows * height) <= 0.5 * max(height, width):
            return rows, places // rows
    return None


def seen_picture(checkpoint: Checkpoint, image: Image.Image) -> Image.Image:
    """The part of the picture that the model sees, in its own size: a centre crop where the processor crops."""
    processor = checkpoint.processor.image_processor
    image = rgb_image(image)
    if getattr(processor, "do_center_crop", False):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.crop((left, top, left + side, top + side))
    return image


def overlay(picture: Image.Image, heat: np.ndarray, side: int = 360) -> Image.Image:
    """A heat map (rows, columns) over a picture: dark where nobody looks, the picture itself in colour of the heat."""
    from matplotlib import colormaps

    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    heat = (heat - heat.min()) / max(float(heat.max() - heat.min()), 1e-12)
    smooth = Image.fromarray((255 * heat).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    level = np.asarray(smooth, dtype=np.float32)[..., None] / 255
    colours = colormaps["inferno"](level[..., 0])[..., :3] * 255
    shown = np.asarray(picture.resize(size), dtype=np.float32)
    mixed = shown * (0.7 - 0.3 * level) + colours * (0.25 + 0.4 * level)
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
