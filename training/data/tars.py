"""Webdataset tars, read where they lie: an index of where each sample's image is, built from the headers.

A sample is the neighbouring files that share a name up to its first dot: `0001.jpg` with `0001.txt`, `0001.json` or
`0001.cls`. Building the index reads headers and texts and skips over the images. It keeps a name, three numbers and the
texts of each sample in memory, so that any image can be read by one `pread`, in any order, by any worker or process:
nothing is unpacked and no worker has a state that resuming would have to restore.
"""

import functools
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .rows import IMAGE_ID_COLUMNS, PROMPT_COLUMNS, TEXT_COLUMNS, Rows

IMAGES = (
    "jpg", "jpeg", "jfif", "png", "webp", "bmp", "dib", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "avif", "jp2",
    "qoi", "ico", "heic", "heif",
)  # fmt: skip
# A file of text becomes a column: of its name's ending, or "text" for .txt. A .json brings the columns of its keys.
TEXTS = (*TEXT_COLUMNS, *PROMPT_COLUMNS)
TEXT_BYTES = 2**20  # the longest text that is read
OPEN_TARS = 64  # of each process, which commonly may open 1024 files


class TarImages:
    """Where the image of each sample is; an item is `{"path": SHARD/NAME, "tar", "offset", "size"}`, or None."""

    def __init__(self, paths: list[str], shards: np.ndarray, names: list[str], places: np.ndarray):
        self.paths, self.shards, self.names, self.places = paths, shards, names, places

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict | None:
        tar, (offset, size) = self.paths[self.shards[index]], self.places[index].tolist()
        if offset < 0:
            return None
        return {"path": f"{tar}/{self.names[index]}", "tar": tar, "offset": offset, "size": size}


def tar_rows(paths: list[str]) -> Rows:
    """The samples of some tars, in order: `image`, and the texts and image ids that there are."""
    shards, names, places, samples = [], [], [], []
    for shard, path in enumerate(paths):
        for name, place, texts in read_index(path):
            shards.append(shard)
            names.append(name)
            places.append(place)
            caption = texts.get("caption", texts.get("captions"))
            samples.append(texts if caption is None else {"text": caption, **texts})  # shards of both kinds go together
    numbers = np.array(shards, dtype=np.int64)
    images = TarImages(paths, numbers, names, np.array(places, dtype=np.int64).reshape(-1, 2))
    return Rows({"image": images, **Rows.from_dicts(samples).columns}, numbers)


def read_index(path: str) -> Iterator[tuple[str, tuple[int, int], dict]]:
    """Name, (offset, size) of the image, and columns of each sample of a tar; offset -1 where it has no image."""
    sample, name, place, columns, members, endings = None, None, (-1, 0), {}, 0, set()
    try:
        with tarfile.open(path, "r:") as tar:  # "r:" is a plain tar: in a compressed one nothing can be addressed
            for member in tar:
                tar.members = []  # tarfile would keep every header
                members += 1
                key, ending = split_name(member.name)
                if not member.isfile() or not ending:
                    continue
                if member.offset_data + member.size > os.path.getsize(path):
                    raise tarfile.ReadError(f"it ends within {member.name}")
                if key != sample:
                    if sample is not None:
                        yield name, place, columns
                    sample, name, place, columns, endings = key, key, (-1, 0), {}, set()
                if ending in endings:  # a second sample of this name: its image would get the first one's text
                    raise ValueError(
                        f"{path} holds {member.name} twice in one sample. Give each sample a name of its own, and write the "
                        "tar again."
                    )
                endings.add(ending)
                if ending in IMAGES:
                    name, place = member.name, (member.offset_data, member.size)
                elif ending in ("txt", "json", *TEXTS) and member.size <= TEXT_BYTES:
                    columns |= read_columns(ending, tar.extractfile(member).read())
            if os.path.getsize(path) < tar.offset + tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it has no end mark")  # cut off between two files
    except (OSError, tarfile.TarError) as error:
        raise ValueError(
            f"{path} is no whole tar: {error} (after {members} files). Fetch it again or leave it out; a compressed tar "
            "must be decompressed first."
        ) from error
    if sample is not None:
        yield name, place, columns


def split_name(path: str) -> tuple[str, str]:
    """Name of the sample and ending in lower case, cut at the first dot of the file's own name."""
    folder, slash, name = path.rpartition("/")
    stem, _, ending = name.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def read_columns(ending: str, content: bytes) -> dict:
    """What a text file of a sample brings. One that is damaged brings nothing, so that its row is reported."""
    try:
        text = content.decode("utf-8", "surrogateescape").strip()  # what is no UTF-8 is told so where rows are read
        if ending != "json":
            return {"text" if ending == "txt" else ending: text}
        columns = json.loads(text)
        wanted = (*TEXTS, *IMAGE_ID_COLUMNS)
        return {key: columns[key] for key in wanted if columns.get(key) is not None}
    except (ValueError, AttributeError):
        return {}


def read_member(address: dict) -> bytes:
    """The bytes of an image in a tar."""
    return os.pread(opened(address["tar"]).fileno(), address["size"], address["offset"])


@functools.lru_cache(OPEN_TARS)
def opened(path: str):
    """A tar kept open; `pread` has no position that workers forked from one process would move for one another."""
    return open(Path(path), "rb", buffering=0)
