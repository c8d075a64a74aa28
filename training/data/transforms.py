"""Image augmentation and caption clean-up of the paper (section 4), without torchvision."""

import math
import random
import re

import torch
import torch.nn.functional as F
from PIL import Image

from modeling_blip2x.images_blip2x import orientation_of, rgb_image

PUNCTUATION = re.compile(r'[.!"()*#:;~]')
WHITESPACE = re.compile(r"\s+")


def clean_caption(text: str, max_words: int = 50) -> str:
    """Lower-case, put spaces for . ! " ( ) * # : ; ~ and keep at most `max_words` words."""
    text = WHITESPACE.sub(" ", PUNCTUATION.sub(" ", text.lower())).strip()
    return " ".join(text.split(" ")[:max_words])


def draw_crop(
    width: int,
    height: int,
    rng: random.Random,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Box (left, top, right, bottom) of a random part, covering `scale` of the area.

    When ten draws of area and aspect ratio do not fit, the largest centred crop within `ratio` is taken.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = rng.randint(0, width - crop_width), rng.randint(0, height - crop_height)
            break
    else:
        crop_width, crop_height = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def augment_image(image: Image.Image, size: tuple[int, int], rng: random.Random) -> torch.Tensor:
    """The training transform: RGB levels (3, height, width), uint8, of a random crop resized to `size` (height, width) by
    bicubic interpolation and flipped horizontally half of the time.

    A JPEG that is not decoded yet is decoded at 1/2, 1/4 or 1/8 of its size where the crop keeps twice `size`: with
    less, training would see sharper images than evaluation.
    """
    width, height = reversed(image.size) if orientation_of(image) >= 5 else image.size
    box = draw_crop(width, height, rng)
    smaller = min((box[2] - box[0]) // (2 * size[1]), (box[3] - box[1]) // (2 * size[0]))
    if smaller > 1:
        image.draft(None, (image.width // smaller, image.height // smaller))
    image = rgb_image(image)
    resized = resize_crop(image, [side * image.width / width for side in box], size)
    return resized.flip(-1) if rng.random() < 0.5 else resized


def resize_crop(image: Image.Image, box: list[float], size: tuple[int, int]) -> torch.Tensor:
    """The part `box` of an RGB image as levels (3, height, width).

    By torch, whose levels differ from PIL's by one or two and come four times as fast.
    """
    left, top, right, bottom = map(round, box)
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    # Four bytes a pixel are what PIL holds in memory: copied as they are, at half the cost of three.
    levels = bytearray(image.crop((left, top, right, bottom)).tobytes("raw", "RGBX"))
    levels = torch.frombuffer(levels, dtype=torch.uint8).view(1, bottom - top, right - left, 4).permute(0, 3, 1, 2)
    return F.interpolate(levels, size=size, mode="bicubic", antialias=True)[0, :3]
