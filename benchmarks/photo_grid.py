"""Photographs of free licence with what a model writes for them, as one picture for the pages.

    python -m benchmarks.photo_grid --model STAGE2 [--stage1 STAGE1] --photos FOLDER/captions.json --output docs/photos_grid.jpg

captions.json is a list of {image, captions, license, flickr_url}, as COCO's annotations give them. Taken are the photos whose
licence is LICENSE, evenly over them, so that nobody has chosen them; each is credited by its number on Flickr, whose page
names the author.
"""

import argparse
import json
import re
import textwrap
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xForPreTraining, Blip2xProcessor
from modeling_blip2x.images_blip2x import rgb_image

LICENSE = "Attribution License"  # CC BY 2.0
COLUMNS, WIDTH, SIDE = 4, 12.0, 2.3  # photos beside one another; inches of the picture, of a photo
SHOWN = (640, 480)  # pixels; photos of one shape leave the same room for the texts over them
BEAMS = 3


def free_photos(captions: Path, count: int) -> list[dict]:
    """`count` photos of LICENSE, evenly over those that there are."""
    rows = [row for row in json.loads(captions.read_text(encoding="utf-8")) if row["license"] == LICENSE]
    if not rows:
        raise ValueError(f"{captions} has no photo whose licence is {LICENSE!r}.")
    step = max(1, len(rows) // count)
    return rows[::step][:count]


@torch.no_grad()
def by_language_model(folder: str, images: list[Image.Image]) -> list[str]:
    """Captions with the prompt that the model was trained with."""
    model, processor = (
        Blip2xForConditionalGeneration.from_pretrained(folder).eval(),
        Blip2xProcessor.from_pretrained(folder),
    )
    prompts = [model.config.prompt_template or "a photo of"] * len(images)
    inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True)
    ids = model.generate(**inputs, num_beams=BEAMS, do_sample=False, max_new_tokens=30)
    return [text.strip() for text in processor.batch_decode_new(ids, inputs["input_ids"])]


@torch.no_grad()
def by_itg_head(folder: str, images: list[Image.Image]) -> list[str]:
    """Captions of a stage-1 model."""
    model, processor = Blip2xForPreTraining.from_pretrained(folder).eval(), Blip2xProcessor.from_pretrained(folder)
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    ids = model.generate(pixel_values=pixels, num_beams=BEAMS, do_sample=False, max_new_tokens=30)
    return processor.tokenizer.batch_decode(ids, skip_special_tokens=True)


def credit(row: dict) -> str:
    """The photo's number on Flickr: flickr.com/photo.gne?id=NUMBER leads to the author's page."""
    number = re.search(r"/(\d+)_", row["flickr_url"])[1]
    return f"flickr {number}, CC BY 2.0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Stage-2 folder, which captions.")
    parser.add_argument("--stage1", help="Stage-1 folder, whose ITG head captions too.")
    parser.add_argument("--photos", required=True, type=Path)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args()
    rows = free_photos(args.photos, args.count)
    images = [rgb_image(Image.open(args.photos.parent / row["image"])) for row in rows]
    texts = {"": by_language_model(args.model, images)}
    if args.stage1:
        texts["stage 1: "] = by_itg_head(args.stage1, images)

    lines = -(-len(rows) // COLUMNS)
    figure = Figure(figsize=(WIDTH, lines * (SIDE + 1.15)), layout="constrained")
    axes = figure.subplots(lines, COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, (axis, image, row) in enumerate(zip(axes.flat, images, rows)):
        axis.imshow(ImageOps.pad(image, SHOWN, color="white"))
        said = [textwrap.fill(name + written[number], 38) for name, written in texts.items()]
        axis.set_title(said[0], fontsize=9, weight="bold", loc="left")
        below = "\n".join([*said[1:], credit(row)])
        axis.text(0, -0.03, below, transform=axis.transAxes, fontsize=7.5, va="top", color="#5d6168")
    figure.savefig(args.output, dpi=110, pil_kwargs={"quality": 85})
    print(f"{args.output}: {len(rows)} photos")


if __name__ == "__main__":
    main()
