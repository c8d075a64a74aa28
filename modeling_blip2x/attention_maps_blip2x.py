"""Where the queries look: cross-attention weights as maps over the image, and drawn as heat over it.

The models' `query_attention` gives the maps, the processor's `seen_picture` and `draw_attention` the drawing. The evaluation
report and the demo call both, and hence show the same.
"""

import numpy as np
import torch
from PIL import Image

MOST_WITHOUT_PLACE = 17  # positions of a tower that stand for no place: a class token and at most 16 registers
# From cold to hot: colour, and how much of the picture it covers. Cold places are darkened, so that hot ones stand out.
STOPS = (0.0, 0.35, 0.7, 1.0)
COLOURS = ((30, 20, 90), (150, 30, 130), (245, 120, 40), (255, 240, 110))
COVERS = (0.45, 0.5, 0.6, 0.75)


class NoGridError(ValueError):
    """A tower's positions are no grid over its image, so there is no map to draw."""


def maps_of(weights: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Weights (..., N) over the tower's positions -> maps (..., rows, columns), each summing to 1.

    Class token and registers, which come first in every tower that has them, are left out before the sum is taken.
    """
    places = weights[..., -grid[0] * grid[1] :]
    return (places / places.sum(-1, keepdim=True).clamp(min=1e-12)).unflatten(-1, grid)


def grid_of(
    positions: int, height: int, width: int, patch_size: int | tuple[int, int] | None = None
) -> tuple[int, int]:
    """Rows and columns of a tower's positions over an image of height x width pixels.

    A tower that keeps the patches it cuts tells its grid by its patch_size. A CNN, or a transformer that merges patches,
    tells no stride; its grid is then the one whose rows and columns come from one stride along both sides.

    Raises:
        NoGridError: no grid over such an image has so many positions.
    """
    if patch_size is not None:
        patch = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        rows, columns = height // patch[0], width // patch[1]
        if 0 < rows * columns <= positions <= rows * columns + MOST_WITHOUT_PLACE:
            return rows, columns
    fewest = max(positions - MOST_WITHOUT_PLACE, positions // 2 + 1)  # one position alone would be a grid over anything
    for places in range(positions, fewest - 1, -1):
        for rows in range(1, places + 1):
            if places % rows == 0 and _has_one_stride(rows, places // rows, height, width):
                return rows, places // rows
    raise NoGridError(
        f"The vision tower gives {positions} positions, which are no grid over an image of {height} x {width} pixels, also "
        f"without up to {MOST_WITHOUT_PLACE} of them that have no place. Pass image_size, the height and width of the pixels "
        "that the tower saw, if they were others."
    )


def _has_one_stride(rows: int, columns: int, height: int, width: int) -> bool:
    # rows = height / stride and columns = width / stride, both rounded up (padded convolutions) or both down.
    rounded_up = height * (columns - 1) < width * rows and width * (rows - 1) < height * columns
    rounded_down = height * columns < width * (rows + 1) and width * rows < height * (columns + 1)
    return rounded_up or rounded_down


def picture_of(pixels: np.ndarray, image_processor: object, side: int) -> Image.Image:
    """pixel_values (3, height, width) of an image processor as a picture again, its longer side `side` pixels long."""
    if getattr(image_processor, "do_normalize", False):
        mean, std = (
            np.asarray(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
        )
        pixels = pixels * std + mean
    if getattr(image_processor, "do_rescale", True):
        pixels = pixels / getattr(image_processor, "rescale_factor", 1 / 255)
    picture = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8).transpose(1, 2, 0))
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)


def overlay(picture: Image.Image, heat: torch.Tensor | np.ndarray, strongest: float | None = None) -> Image.Image:
    """The heat (rows, columns) over the picture, cold to hot from 0 to `strongest`, its own maximum by default."""
    heat = torch.as_tensor(heat).detach().float().cpu().numpy()
    heat = heat / max(float(heat.max()) if strongest is None else strongest, 1e-12)
    smooth = Image.fromarray(heat).resize(picture.size, Image.Resampling.BICUBIC)
    values = np.asarray(smooth).clip(0, 1)  # bicubic overshoots
    colour = np.stack([np.interp(values, STOPS, [c[i] for c in COLOURS]) for i in range(3)], axis=-1)
    cover = np.interp(values, STOPS, COVERS)[..., None]
    return Image.fromarray((np.asarray(picture) * (1 - cover) + colour * cover).round().astype(np.uint8))
