"""Image augmentation and caption clean-up of the paper (section 4), without torchvision."""

import math
import random
import re

from PIL import Image, ImageOps

PUNCTUATION = re.compile(r'[.!"()*#:;~]')
WHITESPACE = re.compile(r"\s+")


def clean_caption(text: str, max_words: int = 50) -> str:
    """Lower-case, put spaces for . ! " ( ) * # : ; ~ and keep at most `max_words` words."""
    text = WHITESPACE.sub(" ", PUNCTUATION.sub(" ", text.lower())).strip()
    return " ".join(text.split(" ")[:max_words])


def random_resized_crop(
    image: Image.Image,
    size: tuple[int, int],
    rng: random.Random,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """Crop a random part covering `scale` of the area and resize it to `size` (height, width), bicubic.

    When ten draws of area and aspect ratio do not fit, the largest centred crop within `ratio` is taken.
    """
    width, height = image.size
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
    box = (left, top, left + crop_width, top + crop_height)
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)


def augment_image(image: Image.Image, size: tuple[int, int], rng: random.Random) -> Image.Image:
    """The training transform: random crop to `size` (height, width), then a horizontal flip half of the time."""
    image = random_resized_crop(image, size, rng)
    return ImageOps.mirror(image) if rng.random() < 0.5 else image
