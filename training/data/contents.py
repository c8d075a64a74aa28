"""What a data set holds, in a few figures that a run keeps, so that another one under the same name is noticed.

Covered are the texts and questions of every usable row, in order; the size in bytes of every image; and the bytes of
images up to `BYTES` in all, which is every image of a small data set and a fixed drawing of a large one. Of the files of a
large one the times of their last change are kept too; a copy has new ones, so these alone refuse nothing. Names and folders
are not looked at: a data set that has moved is the same.
"""

import hashlib
import json
import os
import random
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import pyarrow.compute

from .caption_dataset import CaptionDataset, ImageDataset
from .images import BadRow, image_name, image_source
from .indexed_dataset import IndexedCaptionDataset

BYTES = 2**28  # a second of hashing
IMAGES = 5000  # opened at most: on a network file system each costs a millisecond


def describe_rows(dataset: CaptionDataset | IndexedCaptionDataset) -> dict:
    """`rows`, and marks of their `texts` and `images` in order, of both in `any_order`, and of the files' `times` where not
    all images were read; of an indexed data set, marks of its index."""
    if isinstance(dataset, IndexedCaptionDataset):
        return dataset.describe()
    rows, texts, any_order = dataset.kept.tolist(), hashlib.sha256(), 0
    found = found_images(dataset, rows)
    for (size, _), turns in zip(found, dataset.turns, strict=True):
        text = json.dumps(turns).encode()
        texts.update(text)
        any_order += int.from_bytes(hashlib.sha256(text + str(size).encode()).digest()[:8], "big")
    described = {"rows": len(rows), "texts": texts.hexdigest()[:16], "any_order": f"{any_order % 2**64:016x}"}
    return described | marks_of_images(dataset, rows, found)


def describe_images(dataset: ImageDataset, rows: Sequence[int]) -> dict:
    """Marks of the images of some rows: `images`, and `times` of their files where not all were read."""
    return marks_of_images(dataset, rows, found_images(dataset, rows))


def found_images(dataset: ImageDataset, rows: Sequence[int]) -> list[tuple[int | None, int | None]]:
    found = list(image_sizes(dataset))
    return [found[row] for row in rows]


def marks_of_images(dataset: ImageDataset, rows: Sequence[int], found: list[tuple[int | None, int | None]]) -> dict:
    sizes, times = [size for size, _ in found], [time for _, time in found]
    digest = hashlib.sha256(json.dumps(sizes).encode())
    drawn = draw(sizes)
    for number in drawn:
        digest.update(image_content(dataset, rows[number]))
    described = {"images": digest.hexdigest()[:16]}
    if len(drawn) < len(rows):
        described["times"] = hashlib.sha256(json.dumps(times).encode()).hexdigest()[:16]
    return described


def draw(sizes: list[int | None]) -> list[int]:
    """Which images are read: as many as may be, the same whenever the sizes are."""
    chosen, left = [], BYTES
    for number in random.Random(0).sample(range(len(sizes)), min(len(sizes), IMAGES)):
        left -= sizes[number] or 0
        if left < 0:
            break
        chosen.append(number)
    return sorted(chosen)


def image_sizes(dataset: ImageDataset) -> Iterator[tuple[int | None, int | None]]:
    """(bytes, time of the last change in ns) of the image of every row; no time for embedded ones, (None, None) for what
    is no regular file."""
    images, column, folder = dataset.images, dataset.image_column, dataset.folder
    seen = {}

    def of_file(name: str) -> tuple[int | None, int | None]:
        if name not in seen:  # many rows may show one file
            seen[name] = regular_file(name)
        return seen[name]

    if isinstance(images, datasets.Dataset) and isinstance(images.features[column], datasets.Image):
        for path, size in embedded_sizes(images, column):
            yield (size, None) if size else of_file(image_name(path, folder))
        return
    for row in images:
        value = row[column]
        if isinstance(value, dict) and value.get("bytes"):
            yield len(value["bytes"]), None
        elif isinstance(value, dict) and "tar" in value:
            yield value["size"], None
        else:
            yield of_file(image_name(value, folder))


def embedded_sizes(images: datasets.Dataset, column: str) -> Iterator[tuple[str | None, int | None]]:
    """(path, number of bytes) of each row; touches no image: Arrow keeps lengths apart."""
    for table in images.with_format("arrow").iter(1000):
        values = table[column].combine_chunks()
        paths = pyarrow.compute.struct_field(values, "path")
        lengths = pyarrow.compute.binary_length(pyarrow.compute.struct_field(values, "bytes"))
        yield from zip(paths.to_pylist(), lengths.to_pylist(), strict=True)


def regular_file(name: str) -> tuple[int | None, int | None]:
    try:
        found = os.stat(name)
    except OSError:
        return None, None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else (None, None)


def image_content(dataset: ImageDataset, row: int) -> bytes:
    """The hash of an image's bytes; of nothing where they cannot be read."""
    try:
        source, _ = image_source(dataset.images[row][dataset.image_column], dataset.folder)
        if isinstance(source, Path):
            content = source.read_bytes() if source.is_file() else b""
        else:
            content = source.getvalue()
    except (OSError, BadRow):
        content = b""
    return hashlib.sha256(content).digest()


def changes_of_rows(before: dict, now: dict) -> list[str]:
    """What is another than it was, in words."""
    if before["rows"] != now["rows"]:
        return [f"there were {before['rows']} usable rows, now {now['rows']}"]
    if before["texts"] != now["texts"] and before["any_order"] == now["any_order"]:
        return ["the rows are in another order"]
    changes = ["texts or questions have changed"] if before["texts"] != now["texts"] else []
    return changes + (["images were replaced"] if before["images"] != now["images"] else [])
