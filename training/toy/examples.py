"""Draws the example pictures of the Space: a few toy scenes, held-out colour-shape pairs among them, large enough to see.

python -m blip2x_training.toy.examples --output_dir space_app/examples
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from .scenes import ALL_PAIRS, draw_scene, render

SEED, DRAWN = 7, 24
CHOSEN = (5, 1, 14, 3, 9, 23)
SIDE = 240  # pixels


def draw_examples(output_dir: str | Path) -> list[tuple[Path, str]]:
    """Writes the pictures as `1_a_small_red_circle_....png`; returns their paths and captions."""
    rng = np.random.default_rng(SEED)
    scenes = [draw_scene(rng, ALL_PAIRS) for _ in range(DRAWN)]
    pictures = render(scenes, rng)
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    drawn = []
    for number, index in enumerate(CHOSEN, 1):
        caption = scenes[index].caption
        path = Path(output_dir) / f"{number}_{caption.replace(' ', '_')}.png"
        large = Image.fromarray(pictures[index]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        large.quantize(64).save(path, optimize=True)  # a palette: a third of the size, no visible loss
        drawn.append((path, caption))
    return drawn


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the example pictures of the Space.")
    parser.add_argument("--output_dir", required=True)
    for path, caption in draw_examples(parser.parse_args().output_dir):
        print(f"{path}: {caption}")
