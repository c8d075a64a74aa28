"""Run the frozen vision tower once over a data set and keep its features on disk.

    python training/cache_features.py --dataset DIR --vision_model DIR --output_dir CACHE
    python training/pretrain_stage1.py ... --feature_cache CACHE --augment false

Each split becomes shards that are read back by memory map, and SPLIT.json with a fingerprint of the tower's weights, the
preprocessing and the images: training refuses a cache that does not match. Features are those before the trained
LayerNorm. With --views V the first split holds V views of each image: the plain one, then V - 1 training crops and flips;
each visit in training draws one view. Size and free disk are compared before anything is written. A shard appears whole or
not at all, and the same command continues a run that was stopped with the shards that are missing.

Features are kept in float16 unless told otherwise: as large as bfloat16 with three bits more of precision, and the LayerNorm
that reads them computes in float32. A tower whose features exceed float16's 65504 is named in an error.
"""

import glob
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from blip2x_training.arguments.base import BIG, Arguments, doc
from blip2x_training.arguments.parsing import parse_arguments
from blip2x_training.data.caption_dataset import ImageDataset
from blip2x_training.data.collators import collate_images
from blip2x_training.data.feature_cache import (
    STORED,
    CacheLayout,
    FeatureCache,
    images_fingerprint,
    to_stored,
    tower_fingerprint,
)
from blip2x_training.data.formats import image_start, load_rows
from blip2x_training.data.image_processor import load_image_processor, output_size
from blip2x_training.data.killed_workers import in_multiprocessing, workers_may_die
from blip2x_training.data.transforms import augment_image
from blip2x_training.system.commands import run_command
from blip2x_training.system.fingerprints import differences
from blip2x_training.system.json_lines import read_json_object
from blip2x_training.system.run_lock import locked_folder
from modeling_blip2x.assembling_blip2x import load_vision_model
from modeling_blip2x.vision_blip2x import vision_features

SHARD_BYTES = 10**9  # of a shard, unless rows are given: a stopped run loses one shard at most


@dataclass
class CacheArguments(Arguments):
    """Feature cache of a frozen vision tower."""

    dataset: str | None = doc(None, "As in training. Required.")
    dataset_config: str | None = doc(None, "Its configuration, where the data set has several.")
    output_dir: str | None = doc(None, "Folder of the cache. Required.")
    vision_model: str | None = doc(None, "As in training. Required.")
    splits: list[str] = doc(["train", "validation"], "Splits to encode.")
    views: int = doc(1, "Views of each image of the first split: the plain one, then random crops and flips.")
    seed: int = doc(42, "Draws the crops and flips.")
    image_column: str = doc("image", "As in training.")
    image_folder: str | None = doc(None, "As in training.")
    vision_feature_layer: int = doc(-1, "As in training.")
    image_size: int | None = doc(None, "As in training.")
    batch_size: int = doc(32, "Images in one forward, whose views go one after another.")
    dataloader_num_workers: int = doc(0, "Processes that read and crop images; 0 does so in the main one.")
    dtype: str = doc("float16", "float16, bfloat16 or float32: how features are stored.")
    shard_size: int | None = doc(None, "Rows in one file at most; null: as many as take 1 GB.")
    max_skip_fraction: float = doc(0.1, "Images that cannot be read are named; a larger share of a split is refused.")
    overwrite_output_dir: bool = doc(False, "Replace a cache of something else in output_dir.")

    REQUIRED = ("dataset", "output_dir", "vision_model")
    PATHS = ("image_folder", "vision_model")
    CHOICES = {"dtype": tuple(STORED)}
    RANGES = {
        "batch_size": (1, BIG), "views": (1, BIG), "shard_size": (1, BIG), "dataloader_num_workers": (0, BIG),
        "max_skip_fraction": (0, 1),
    }  # fmt: skip


@dataclass
class Split:
    """One split to encode: its images and how their features will lie on disk."""

    name: str
    images: ImageDataset
    layout: CacheLayout
    description: dict
    missing: list[int] = field(default_factory=list)  # shards that no earlier run wrote


class Views(torch.utils.data.Dataset):
    """Pixels (V, 3, H, W) of the views of a row, or None where its image cannot be read."""

    def __init__(self, images: ImageDataset, image_processor, views: int, seed: int):
        self.images, self.image_processor, self.views, self.seed = images, image_processor, views, seed
        self.size = output_size(image_processor)

    def __getitem__(self, row: int) -> tuple[torch.Tensor | None, str]:
        try:
            image = self.images.image(row)
        except ValueError as error:
            return None, str(error)
        draws = [random.Random(f"{self.seed}-{view}-{row}") for view in range(1, self.views)]
        crops = [{"image": augment_image(image, self.size, draw)} for draw in draws]
        pixels = [collate_images([{"image": image}], self.image_processor, cropped=False)["pixel_values"]]
        if crops:
            pixels.append(collate_images(crops, self.image_processor, cropped=True)["pixel_values"])
        return torch.cat(pixels), ""

    def batches(self, rows: range, batch_size: int, num_workers: int) -> Iterator[list]:
        order = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        return iter(torch.utils.data.DataLoader(self, batch_sampler=order, collate_fn=list, num_workers=num_workers))


@torch.no_grad()
def write_shard(
    split: Split, shard: int, views: Views, tower: torch.nn.Module, feature_layer: int, folder: Path, loading: dict
) -> list[str]:
    """Write one file of features; returns what was wrong with images that cannot be read, whose features are NaN."""
    layout, rows = split.layout, split.layout.rows(shard)
    path = layout.path(folder, split.name, shard)
    with whole_array(path, STORED[layout.dtype], (len(rows), *layout.shape[1:])) as file:
        return encode_rows(split, rows, views, tower, feature_layer, loading, file)


def encode_rows(
    split: Split, rows: range, views: Views, tower: torch.nn.Module, feature_layer: int, loading: dict, file: BinaryIO
) -> list[str]:
    """Append the features of the rows to a file; returns what was wrong with images."""
    device, layout = next(tower.parameters()).device, split.layout
    title, steps = f"{split.name}, rows {rows.start} to {rows.stop - 1}", math.ceil(len(rows) / loading["batch_size"])
    faults, done = [], 0
    for batch in tqdm(views.batches(rows, **loading), title, steps):
        faults += [fault for pixels, fault in batch if pixels is None]
        readable = [number for number, (pixels, _) in enumerate(batch) if pixels is not None]
        encoded = torch.full((len(batch), *layout.shape[1:]), torch.nan)
        for view in range(views.views) if readable else ():
            pixels = torch.stack([batch[number][0][view] for number in readable])
            pixels = pixels.to(device, memory_format=torch.channels_last)  # 1.6 times as fast for a CNN on a CPU
            encoded[readable, view] = vision_features(tower, pixels, feature_layer).last_hidden_state.cpu().float()
        check_finite(split, encoded[readable], [rows[done + number] for number in readable])
        file.write(to_stored(encoded, layout.dtype).tobytes())
        done += len(batch)
    return faults


def check_finite(split: Split, features: torch.Tensor, rows: list[int]) -> None:
    """Raise ValueError where the tower gives NaN or infinity for one of the rows, or where the cache's dtype does."""
    finite = features.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        row = rows[int((~finite).nonzero()[0])]
        raise ValueError(
            f"The vision tower gives features that are not finite for row {row} of split {split.name!r} "
            f"({split.images.name(row)}): NaN or infinity. Its weights, or the image's pixels after preprocessing, are broken: "
            "check --vision_model. The cache is not whole."
        )
    dtype = split.layout.dtype
    if not features.to(getattr(torch, dtype)).isfinite().all():
        raise ValueError(
            f"Features of split {split.name!r}, rows {rows[0]} to {rows[-1]} are not finite in {dtype}; their largest is "
            f"{features.abs().max():.4g}. Pass --dtype {'bfloat16 or ' if dtype == 'float16' else ''}float32."
        )


def check_readable(split: Split, folder: Path, max_fraction: float) -> None:
    """Raise ValueError where too many rows of a written split are NaN, since their images could not be read."""
    unreadable, rows = FeatureCache(folder, split.name, split.layout).unreadable(), split.layout.shape[0]
    if len(unreadable) > max_fraction * rows:
        first = unreadable[0]
        raise ValueError(
            f"{len(unreadable)} of {rows} images of split {split.name!r} could not be read, above --max_skip_fraction "
            f"{max_fraction}; the first: row {first} ({split.images.name(first)}). The cache is not whole. Check --dataset and "
            "--image_folder, repair the images or raise it, and pass --overwrite_output_dir."
        )


@contextmanager
def whole_array(path: Path, dtype: type, shape: tuple[int, ...]) -> Iterator[BinaryIO]:
    """A .npy file to append the rows of an array to, which takes its name when all are on the disk.

    Ordinary writes, because a full disk is an error of theirs; of a memory map it is a signal that kills the process.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError) or in_multiprocessing(error):
            raise
        raise OSError(
            f"{path} could not be written ({error}). The files before it are whole: free some space and give the same "
            "command again."
        ) from error


def feature_shape(tower: torch.nn.Module, image_processor, feature_layer: int) -> tuple[int, int]:
    """(N, D) of the features of an image."""
    height, width = output_size(image_processor)
    pixels = image_processor(images=[Image.new("RGB", (width, height))], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = vision_features(tower, pixels.to(next(tower.parameters()).device), feature_layer)
    return tuple(features.last_hidden_state.shape[1:])


def plan_split(args: CacheArguments, name: str, views: int, shape: tuple[int, int], fingerprint: dict) -> Split:
    """What to write of a split, with nothing written yet.

    Raises ValueError if the folder holds another cache of it, unless that is to be overwritten.
    """
    rows = load_rows(args.dataset, name, args.image_folder, args.dataset_config)
    images = ImageDataset(rows, args.image_column, image_start(args.dataset, args.image_folder))
    whole = CacheLayout((len(images), views, *shape), args.dtype, 1)
    shard_size = args.shard_size or max(1, SHARD_BYTES // whole.num_bytes([0]))
    layout = CacheLayout(whole.shape, args.dtype, shard_size)
    description = fingerprint | {"images": images_fingerprint(images), "shape": list(layout.shape), "dtype": args.dtype}
    description |= {"shard_size": shard_size, "seed": args.seed if views > 1 else None}
    split = Split(name, images, layout, description)
    before = read_description(Path(args.output_dir), name)
    differs = before and differences(before, description)
    if differs and not args.overwrite_output_dir:
        raise ValueError(
            f"{args.output_dir} holds another cache of split {name!r} ({differs}). Choose another --output_dir, or pass "
            "--overwrite_output_dir to replace it."
        )
    continues = before and not differs
    split.missing = [
        shard
        for shard in range(layout.num_shards)
        if not (continues and layout.path(Path(args.output_dir), name, shard).exists())
    ]
    return split


def read_description(folder: Path, split: str) -> dict | None:
    """Description of a finished cache, or of one that was begun."""
    for name in (f"{split}.json", f"{split}.json.begun"):
        if (folder / name).exists():
            return read_json_object(folder / name, f"Delete {folder} and write the cache again.")
    return None


def check_disk(splits: list[Split], folder: Path) -> None:
    """Print what will be written; raise ValueError where the disk has no room for it."""
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    needed = sum(split.layout.num_bytes(split.missing) for split in splits)
    for split in splits:
        rows, views, positions, width = split.layout.shape
        print(
            f"{split.name}: {rows} images x {views} view(s) x {positions} x {width} {split.layout.dtype}, "
            f"{gigabytes(split.layout.num_bytes())}, {split.layout.num_shards} shard(s) of which "
            f"{split.layout.num_shards - len(split.missing)} are there"
        )
    print(f"To write: {gigabytes(needed)}. Free in {folder}: {gigabytes(free)}.")
    if needed > free:
        raise ValueError(
            f"The features take {gigabytes(needed)}, but {folder} has {gigabytes(free)} free. Make room, choose "
            "another --output_dir, or lower --views."
        )


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.3f} GB" if count >= 10**7 else f"{count} bytes"


def begin(split: Split, folder: Path) -> None:
    """Say what the shards to come are; remove those of a cache that is replaced."""
    if len(split.missing) == split.layout.num_shards:
        for path in folder.glob(f"{glob.escape(split.name)}-*-of-*.npy*"):
            path.unlink()
    begun = folder / f"{split.name}.json.begun"
    temporary = begun.with_suffix(".tmp")
    temporary.write_text(json.dumps(split.description), encoding="utf-8")
    os.replace(temporary, begun)
    (folder / f"{split.name}.json").unlink(missing_ok=True)  # a cache without its description is not whole


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(CacheArguments, sys.argv[1:] if argv is None else argv)
    with (
        locked_folder(args.output_dir),
        workers_may_die(lambda: "What is written is whole, and the same command goes on with the rest."),
    ):
        run(args)


def run(args: CacheArguments) -> None:
    """Write the shards of all splits that no earlier run has written."""
    output_dir = Path(args.output_dir)
    image_processor = load_image_processor(args.vision_model, args.image_size)
    tower = (
        load_vision_model(args.vision_model)
        .eval()
        .to("cuda" if torch.cuda.is_available() else "cpu", memory_format=torch.channels_last)
    )
    fingerprint = tower_fingerprint(tower, args.vision_feature_layer, image_processor)
    shape = feature_shape(tower, image_processor, args.vision_feature_layer)
    splits = [
        plan_split(args, name, 1 if number else args.views, shape, fingerprint)
        for number, name in enumerate(args.splits)
    ]
    check_disk(splits, output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    loading = {"batch_size": args.batch_size, "num_workers": args.dataloader_num_workers}
    for split in splits:
        views = Views(split.images, image_processor, split.layout.shape[1], args.seed)
        if split.missing:
            begin(split, output_dir)
        for shard in split.missing:
            faults = write_shard(split, shard, views, tower, args.vision_feature_layer, output_dir, loading)
            for fault in faults:
                print(f"{split.name}: {fault}", file=sys.stderr)
        check_readable(split, output_dir, args.max_skip_fraction)
        if split.missing or not (output_dir / f"{split.name}.json").exists():
            os.replace(output_dir / f"{split.name}.json.begun", output_dir / f"{split.name}.json")
        print(f"{output_dir / split.name}.json: whole")


def command() -> None:
    """main, with a mistake told in one line: the installed command."""
    run_command(main)


if __name__ == "__main__":
    command()
