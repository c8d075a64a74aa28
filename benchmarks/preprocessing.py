"""Images a second of one core: 640 x 480 JPEGs to pixels of 224 x 224, against transformers' PIL image processor.

Evaluation, ours: `open_image` and the collator. Baseline: PIL's open and convert, then the processor. Equal bits.
Training, ours: the rows of `CaptionDataset` and the collator. Baseline, the usual pipeline: PIL's open and convert, crop
and bicubic resize by PIL, flip by PIL, then rescaling and normalising by the processor. Same boxes and flips.
"""

import io
import random

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BlipImageProcessorPil

from benchmarks.measure import Row, alternating_seconds
from blip2x_training.data.collators import collate_images
from blip2x_training.data.images import open_image, opened
from blip2x_training.data.transforms import augment_image, draw_crop

SIZE = (224, 224)
IMAGES = 32
AIM = 2.0


def jpegs(count: int) -> list[bytes]:
    """Noise of every scale, as photos have it; about 3 bits a pixel (photos of COCO: about 4)."""
    generator = np.random.default_rng(0)
    files = []
    for _ in range(count):
        pixels = np.zeros((480, 640, 3))
        for step in (2, 4, 8, 16, 32, 64, 128):
            noise = generator.normal(128, 1, (480 // step + 1, 640 // step + 1, 3))
            coarse = Image.fromarray((128 + 40 * (noise - 128)).clip(0, 255).astype(np.uint8))
            pixels += (np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), float) - 128) * step**0.5 / 8
        file = io.BytesIO()
        Image.fromarray((128 + pixels).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    return files


def run(device: str) -> list[Row]:
    files = jpegs(IMAGES)
    print(f"{sum(map(len, files)) / len(files) / 1000:.0f} kB a JPEG", flush=True)
    processor = BlipImageProcessorPil(size={"height": SIZE[0], "width": SIZE[1]})

    def evaluation() -> torch.Tensor:
        items = [{"image": open_image({"bytes": file}, None)} for file in files]
        return collate_images(items, processor, cropped=False)["pixel_values"]

    def plain_evaluation() -> torch.Tensor:
        images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
        return processor(images=images, return_tensors="pt")["pixel_values"]

    def training() -> torch.Tensor:
        items = []
        for number, file in enumerate(files):
            with opened({"bytes": file}, None) as image:
                items.append({"image": augment_image(image, SIZE, random.Random(number))})
        return collate_images(items, processor, cropped=True)["pixel_values"]

    def plain_training() -> torch.Tensor:
        crops = []
        for number, file in enumerate(files):
            image, rng = Image.open(io.BytesIO(file)).convert("RGB"), random.Random(number)
            crop = image.crop(draw_crop(*image.size, rng)).resize(SIZE, Image.Resampling.BICUBIC)
            crops.append(ImageOps.mirror(crop) if rng.random() < 0.5 else crop)
        return processor(images=crops, return_tensors="pt", do_resize=False)["pixel_values"]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker of the data loader
    equal = torch.equal(evaluation(), plain_evaluation())
    levels = (training() - plain_training()).abs() * torch.tensor(processor.image_std)[:, None, None] * 255
    rows = []
    cases = [
        (f"evaluation, pixels {'equal' if equal else 'DIFFER'}", evaluation, plain_evaluation, None),
        (f"training, {levels.mean():.2f} levels of 255 apart on average", training, plain_training, AIM),
    ]
    for case, ours, theirs, aim in cases:
        seconds = alternating_seconds({"ours": ours, "theirs": theirs}, "cpu", repeats=15)
        rate = {name: IMAGES / value for name, value in seconds.items()}
        ratio = rate["ours"] / rate["theirs"]
        met = None if aim is None else ratio >= aim
        rows.append(
            Row("preprocessing", case, "cpu", "float32", rate["ours"], rate["theirs"], "images/s", ratio, aim, met)
        )
    torch.set_num_threads(threads)
    return rows
