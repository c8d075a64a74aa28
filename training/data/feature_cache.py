"""Features of a frozen tower kept on disk by cache_features.py, and whether they belong to a model and its data.

A split is SPLIT-00000-of-0000S.npy and so on, each (rows, views, N, D), and SPLIT.json, which says what the features were
made from and of what shape they are. It is written last: where it is, the shards are whole.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..system.fingerprints import differences, weights_fingerprint
from .caption_dataset import CaptionDataset, ImageDataset
from .images import BadRow, FoundImage, find_images

STORED = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}  # numpy has no bfloat16: its bits
OPEN_SHARDS = 128  # a memory map holds a file descriptor, of which a process commonly has 1024


@dataclass(frozen=True)
class CacheLayout:
    """How the features of a split, (rows, views, N, D) of `dtype`, are cut into files of `shard_size` rows."""

    shape: tuple[int, int, int, int]
    dtype: str
    shard_size: int

    @property
    def num_shards(self) -> int:
        return math.ceil(self.shape[0] / self.shard_size)

    def path(self, folder: Path, split: str, shard: int) -> Path:
        return folder / f"{split}-{shard:05d}-of-{self.num_shards:05d}.npy"

    def rows(self, shard: int) -> range:
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.shape[0]))

    def num_bytes(self, shards: Sequence[int] | None = None) -> int:
        """Bytes of some shards, by default of all, without the 128 of each file's header."""
        rows = self.shape[0] if shards is None else sum(len(self.rows(shard)) for shard in shards)
        return rows * math.prod(self.shape[1:]) * np.dtype(STORED[self.dtype]).itemsize


class FeatureCache:
    """The features of one split, read from disk by memory map as they are asked for."""

    def __init__(self, folder: Path, split: str, layout: CacheLayout):
        self.paths = [layout.path(folder, split, shard) for shard in range(layout.num_shards)]
        self.layout, self.views, self.opened = layout, layout.shape[1], {}

    def __len__(self) -> int:
        return self.layout.shape[0]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"opened": {}}  # a memory map would be sent to a worker with all its content

    def read(self, row: int, view: int = 0) -> torch.Tensor:
        """Features (N, D) of a view of a row, as float32; ValueError where the image could not be read."""
        shard, place = divmod(row, self.layout.shard_size)
        features = self.as_floats(self.shard(shard)[place, view])
        if features[0, 0].isnan():
            raise ValueError(
                f"The image of row {row} could not be read when its features were written ({self.paths[shard].name}). "
                "Repair or remove the row and write the cache again."
            )
        return features

    def unreadable(self) -> list[int]:
        """Rows whose images could not be read when their features were written."""
        firsts = [self.as_floats(self.shard(shard)[:, 0, 0, 0]) for shard in range(self.layout.num_shards)]
        return torch.cat(firsts).isnan().nonzero()[:, 0].tolist()

    def shard(self, number: int) -> np.ndarray:
        """(rows, views, N, D) as stored, mapped into memory."""
        if number not in self.opened:
            if len(self.opened) >= OPEN_SHARDS:
                self.opened.clear()
            self.opened[number] = np.load(self.paths[number], mmap_mode="r")
        return self.opened[number]

    def as_floats(self, stored: np.ndarray) -> torch.Tensor:
        values = torch.from_numpy(np.array(stored))
        return (values.view(torch.bfloat16) if self.layout.dtype == "bfloat16" else values).float()


def to_stored(features: torch.Tensor, dtype: str) -> np.ndarray:
    """Features on any device as numpy holds them; bfloat16 as its bits."""
    features = features.to(getattr(torch, dtype)).cpu()
    return (features.view(torch.uint16) if dtype == "bfloat16" else features).numpy()


def tower_fingerprint(tower: torch.nn.Module, feature_layer: int, image_processor) -> dict[str, str | int]:
    """What the features of an image depend on: weights, layer and preprocessing."""
    preprocessing = json.dumps(image_processor.to_dict(), sort_keys=True, default=str)
    return {
        "weights": weights_fingerprint(tower),
        "vision_feature_layer": feature_layer,
        "preprocessing": hashlib.sha256(preprocessing.encode()).hexdigest()[:16],
    }


def images_fingerprint(dataset: ImageDataset) -> str:
    """Hash of which images the rows show, in order, by all of their bytes; those that are missing count as such."""
    digest, known = hashlib.blake2b(digest_size=8), {}
    for image in find_images(dataset.images, dataset.image_column, dataset.folder):
        place = None if isinstance(image, BadRow) else image.place
        content = known.get(place) or content_or_none(image)
        if place is not None:  # many rows may show one file
            known[place] = content
        digest.update(content)
    return digest.hexdigest()


def content_or_none(image: FoundImage | BadRow) -> bytes:
    try:
        return b"no image" if isinstance(image, BadRow) else image.content()
    except OSError:
        return b"no image that can be read"


def use_feature_cache(folder: str, model: torch.nn.Module, image_processor, splits: dict[str, CaptionDataset]) -> None:
    """Let data sets give cached features instead of images, after checking that they belong to this tower and data."""
    fingerprint = tower_fingerprint(model.shared_model.vision_model, model.config.vision_feature_layer, image_processor)
    for split, dataset in splits.items():
        dataset.use_features(load_features(folder, split, {**fingerprint, "images": images_fingerprint(dataset)}))


def load_features(folder: str, split: str, fingerprint: dict) -> FeatureCache:
    """The feature cache of a split.

    Raises ValueError if there is none, if shards are missing or cut off, or if it was written by other weights,
    preprocessing or images.
    """
    try:
        described = json.loads((Path(folder) / f"{split}.json").read_text(encoding="utf-8"))
        layout = CacheLayout(tuple(described["shape"]), described["dtype"], described["shard_size"])
        if len(layout.shape) != 4 or not all(
            type(size) is int and size > 0 for size in (*layout.shape, layout.shard_size)
        ):
            raise ValueError(f"its shape is {described['shape']}, of {described['shard_size']} rows a shard")
        cache = FeatureCache(Path(folder), split, layout)
        for shard, path in enumerate(cache.paths):
            if path.stat().st_size <= layout.num_bytes([shard]):
                raise ValueError(f"{path.name} is cut off")
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, MemoryError) as error:
        raise ValueError(
            f"--feature_cache {folder} has no whole cache of split {split!r} ({type(error).__name__}: {error}). "
            "Write it with cache_features.py; the same command again completes one that was stopped."
        ) from error
    differs = differences(described, fingerprint)
    if differs:
        changed = "images" in fingerprint and described.get("images") != fingerprint["images"]
        explained = "; `images` is a hash of the contents and the order of the image files" if changed else ""
        raise ValueError(
            f"--feature_cache {folder}, split {split!r} does not belong to this run ({differs}{explained}). "
            "Write one that does with cache_features.py."
        )
    return cache
