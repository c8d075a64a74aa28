"""The index of a data set on disk: where the image of each row is, and its texts, in files that all processes map.

A folder for each split, of three files:

    index.json  what was indexed, the columns, and of each shard its file, size, time of change and number of rows
    rows.bin    PLACE of each row, 32 bytes
    texts.bin   the columns of each row as JSON, one after another

index.json is written last: where it is, the others are whole. A process keeps of an index what index.json holds, whatever
the number of rows.
"""

import json
import mmap
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..system.atomic_files import write_whole
from ..system.json_lines import read_json_object

VERSION = 1
# Of a row: where its JSON stands in texts.bin, and where its image is in the shard's file. `offset` is -1 where the JSON
# itself names a file; in parquet it is the row's number in its row group, and `size` 0.
PLACE = np.dtype([("text", "<u8"), ("offset", "<i8"), ("size", "<u8"), ("length", "<u4"), ("spare", "<u4")])
IMAGE = "image"  # the JSON's name of a path, or in a tar of the member


@dataclass(frozen=True)
class Shard:
    """Rows that are read together: a tar, a row group of a parquet file, or a run of rows whose images are files.

    file: the tar or parquet file, or that of the rows. size, changed: its bytes, and the time of its last change in ns, or of
    a remote file `mark`, which tells its content from another.
    group, column: number of the row group, and its column of images. fault: why all of it is left out, and then `lost` rows of it are known.
    """

    kind: str
    file: str
    size: int
    changed: int
    rows: int
    group: int | None = None
    column: str | None = None
    mark: str | None = None
    fault: str | None = None
    lost: int = 0


@dataclass(frozen=True)
class Index:
    """A split of a data set by its index; `starts` (shards + 1,) is the first row of each shard, and the end."""

    folder: Path
    source: str
    split: str
    columns: list[str]
    shards: list[Shard]
    starts: np.ndarray
    digest: str

    def __len__(self) -> int:
        return int(self.starts[-1])

    def shard_of(self, row: int) -> Shard:
        return self.shards[int(np.searchsorted(self.starts, row, side="right")) - 1]


def write_index(folder: Path, described: dict, shards: Sequence[Shard]) -> None:
    """Write index.json, which makes the folder an index."""
    content = {"version": VERSION, **described, "shards": [asdict(shard) for shard in shards]}
    write_whole(folder / "index.json", json.dumps(content).encode())


def is_index(path: str | Path) -> bool:
    """Whether a folder holds the indexes of splits."""
    return Path(path).is_dir() and any(Path(path).glob("*/index.json"))


def splits_of(path: str | Path) -> list[str]:
    """Names of the splits that a folder holds indexes of."""
    return sorted(inside.parent.name for inside in Path(path).glob("*/index.json"))


def open_index(path: str | Path, split: str) -> Index:
    """The index of a split. Raises ValueError for one that is damaged, of another version, or whose files have changed."""
    folder = Path(path) / split
    content = read_json_object(folder / "index.json", "Write the index again: index_dataset.py.")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{folder} is an index of version {content.get('version')}, not {VERSION}. Write it again: index_dataset.py."
        )
    shards = [Shard(**shard) for shard in content["shards"]]
    starts = np.cumsum([0, *(shard.rows for shard in shards)])
    for name, size in (("rows.bin", int(starts[-1]) * PLACE.itemsize), ("texts.bin", content["text_bytes"])):
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != size:
            raise ValueError(f"{folder / name} has {found} bytes, not {size}. Write the index again: index_dataset.py.")
    return Index(folder, content["source"], content["split"], content["columns"], shards, starts, content["digest"])


def check_files(index: Index) -> None:
    """Raise ValueError for a file that is gone or not what was indexed, by its size and the time of its last change."""
    for shard in {shard.file: shard for shard in index.shards}.values():
        if shard.mark is not None:
            continue  # a remote file is asked when it is fetched
        try:
            about = os.stat(shard.file)
        except OSError as error:
            raise ValueError(
                f"{shard.file} is in the index {index.folder}, but cannot be found ({error.strerror}). Fetch it again, or "
                "write the index again: index_dataset.py."
            ) from error
        if (about.st_size, about.st_mtime_ns) != (shard.size, shard.changed):
            raise ValueError(
                f"{shard.file} has changed since it was indexed: {about.st_size} bytes, {shard.size} then; or its time is "
                f"another. Write the index again: index_dataset.py --overwrite true, or give another --output."
            )


class IndexedRows:
    """The rows of an index by their numbers, read from its files as they are asked for."""

    def __init__(self, index: Index):
        self.index, self.opened = index, None

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"opened": None}  # a worker maps the files itself

    def __getitem__(self, row: int) -> tuple[Shard, np.void, dict]:
        """Shard, PLACE and columns of a row."""
        places, texts = self.files()
        place = places[row]
        start = int(place["text"])
        return self.index.shard_of(row), place, json.loads(texts[start : start + int(place["length"])])

    def files(self) -> tuple[np.ndarray, mmap.mmap | bytes]:
        if self.opened is None:
            folder = self.index.folder
            places = np.memmap(folder / "rows.bin", PLACE, mode="r") if len(self) else np.zeros(0, PLACE)
            with open(folder / "texts.bin", "rb") as file:
                texts = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(self) else b""
            self.opened = places, texts
        return self.opened
