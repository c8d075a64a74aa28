"""The image of a row of an index: what `images.py` opens, read from tar, row group or file."""

import contextlib
import functools
import re
from collections.abc import Iterator

import datasets
import numpy as np
import pyarrow.parquet

from .images import image_name
from .index_files import IMAGE, Index, IndexedRows, Shard, check_files, open_index, splits_of
from .order import GROUP
from .remote import RangeFile, is_remote
from .rows import Rows
from .shard_cache import ShardCache

GROUPS = GROUP  # row groups held by a process: as many as are shuffled together, so that each is read once an epoch


def image_value(shard: Shard, place: np.void, values: dict, cache: ShardCache | None = None) -> dict | str | None:
    """A path, or a dict with `path` and `bytes` or the place in a tar; None where the row has no image.

    cache: where a remote shard may lie; what it has not, or lets go of meanwhile, is read by its range.
    """
    cached = cache.find(shard) if cache and shard.mark is not None else None
    if cached:
        with contextlib.suppress(FileNotFoundError):
            return value_in(cached, shard, place, values)
    return value_in(shard.file, shard, place, values)


def value_in(file: str, shard: Shard, place: np.void, values: dict) -> dict | str | None:
    """`image_value` read from `file`, that of the shard or a copy of it."""
    name, offset, size = name_of_image(shard, place, values), int(place["offset"]), int(place["size"])
    if shard.kind == "tar":
        if offset < 0:
            return None
        if file == shard.file:
            return {"path": name, "tar": file, "offset": offset, "size": size}
        with open(file, "rb") as copy:  # not kept open: a copy that the cache removes would go on taking its space
            copy.seek(offset)
            return {"path": name, "bytes": copy.read(size)}
    if shard.kind == "parquet":
        image = row_group(file, shard.group, shard.column)[offset].as_py()
        if isinstance(image, dict):
            return {**image, "path": image.get("path") or name} if image.get("bytes") else image.get("path")
        return {"bytes": image, "path": name} if isinstance(image, bytes) else image
    return values[IMAGE]


def name_of_image(shard: Shard, place: np.void, values: dict) -> str:
    """What a report calls the image of a row; reads nothing."""
    if shard.kind == "tar":
        return f"{shard.file}/{values[IMAGE]}"
    if shard.kind == "parquet":
        return f"{shard.file}, row {int(place['offset'])} of group {shard.group}"
    return image_name(values[IMAGE], None)


@functools.lru_cache(GROUPS)
def row_group(file: str, group: int, column: str):
    """The images of a row group, encoded, as one Arrow array."""
    opened = pyarrow.parquet.ParquetFile(RangeFile(file) if is_remote(file) else file)
    return opened.read_row_group(group, columns=[column])[column].combine_chunks()


class IndexedImages:
    """The images of some rows as a column of `Rows`."""

    def __init__(self, rows: IndexedRows, numbers: list[int]):
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> dict | str | None:
        return image_value(*self.rows[self.numbers[number]])

    def __iter__(self) -> Iterator[dict | str | None]:
        return (self[number] for number in range(len(self)))


def rows_of_index(index: Index, ranges: list[tuple[int, int]]) -> Rows:
    """The rows of an index in memory, as validation and evaluation read them."""
    indexed = IndexedRows(index)
    numbers = [row for first, end in ranges for row in range(first, end)]
    texts = Rows.from_dicts(
        [{name: value for name, value in indexed[row][2].items() if name != IMAGE} for row in numbers]
    )
    return Rows({IMAGE: IndexedImages(indexed, numbers), **texts.columns})


def ranges_of(split: str, name: str, count: int) -> list[tuple[int, int]]:
    """(first, end) of the rows that a split such as `train[:90%]` names, of an index of `name` with `count` rows."""
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: count})
    return [(part.from_, part.to) for part in parts]


def open_split(path: str, split: str) -> tuple[Index, list[tuple[int, int]]]:
    """The index that a split, or a slice of it, is part of, and (first, end) of its rows.

    Raises ValueError for a split that is not indexed, or whose files have changed.
    """
    name, known = re.match(r"\w*", split)[0], splits_of(path)
    if name not in known:
        raise ValueError(
            f"{path} is an index of {', '.join(known)}. Name one of these, or index {name!r} too: index_dataset.py"
        )
    index = open_index(path, name)
    check_files(index)
    return index, ranges_of(split, name, len(index))
