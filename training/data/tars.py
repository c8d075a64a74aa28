"""Webdataset tars, read where they lie: an index of where each sample's image is, built from the headers.

A sample is an image and the files of its tar whose names begin with the image's, up to a dot: `0001.jpg` with `0001.txt`,
`0001.json` or `0001.cls`, in any order. Where images are called `0001` and `0001.v2`, a file belongs to the longest that
fits; webdataset itself cuts at the first dot, and would throw `img.v1.jpg` and `img.v2.jpg` together.

Building the index reads headers and texts and skips over the images. It keeps a name, three numbers and the texts of each
sample in memory, so that any image can be read by one `pread`, in any order, by any worker or process: nothing is unpacked
and no worker has a state that resuming would have to restore.
"""

import functools
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .remote import is_remote, read_range
from .rows import IMAGE_ID_COLUMNS, PROMPT_COLUMNS, TEXT_COLUMNS, Rows

IMAGES = frozenset((
    "jpg", "jpeg", "jfif", "png", "webp", "bmp", "dib", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "avif", "jp2",
    "qoi", "ico", "heic", "heif",
))  # fmt: skip
# A file of text becomes a column: of its name's ending, or "text" for .txt. A .json brings the columns of its keys.
TEXTS = (*TEXT_COLUMNS, *PROMPT_COLUMNS)
COLUMNS = frozenset(("txt", "json", *TEXTS))  # endings of files that bring columns
TEXT_BYTES = 2**20  # the longest text that is read
READ = 4096  # bytes at once: a header, mostly with a text and the header after it
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
            samples.append(columns_of(texts))
    numbers = np.array(shards, dtype=np.int64)
    images = TarImages(paths, numbers, names, np.array(places, dtype=np.int64).reshape(-1, 2))
    return Rows({"image": images, **Rows.from_dicts(samples).columns}, numbers)


def columns_of(texts: dict) -> dict:
    """The columns of a sample: shards with .txt and shards with .json captions go together."""
    caption = texts.get("caption", texts.get("captions"))
    return texts if caption is None else {"text": caption, **texts}


@dataclass(slots=True)
class Member:
    """A file of a tar; `columns` is what it brings if it is a text."""

    name: str
    place: tuple[int, int]  # offset and size
    columns: dict | None = None


@dataclass(slots=True)
class Sample:
    """The files of one sample by their endings, such as jpg and txt."""

    stem: str
    files: dict[str, Member] = field(default_factory=dict)

    def has_image(self) -> bool:
        return any(ending in IMAGES for ending in self.files)

    def columns(self) -> dict:
        found = {}
        for ending, member in self.files.items():
            if member.columns and ending in COLUMNS:
                found |= member.columns
        return found

    def image(self) -> tuple[str, tuple[int, int]]:
        """Name and place of its image, the last one; its own name and no place where it has none."""
        images = [member for ending, member in self.files.items() if ending in IMAGES]
        return (images[-1].name, images[-1].place) if images else (self.stem, (-1, 0))


def read_index(path: str) -> Iterator[tuple[str, tuple[int, int], dict]]:
    """Name, (offset, size) of the image, and columns of each sample of a tar; offset -1 where it has no image.

    Raises ValueError for what is no whole tar, and for names of which it cannot be told what belongs together.
    """
    neighbours = group_neighbours(path, read_members(path))
    places: dict[str, list[Sample]] = {}
    for sample in neighbours:
        places.setdefault(sample.stem, []).append(sample)
    samples = [sample for found in places.values() for sample in (found if len(found) == 1 else joined(path, found))]
    described = [(sample, sample.columns()) for sample in samples]
    told = {sample.stem for sample, columns in described if columns and sample.has_image()}
    for sample, columns in described:
        # Left out is 0001.seg.png beside 0001.jpg with its text: another picture of that sample.
        if columns or told.isdisjoint(shorter_names(sample.stem)):
            yield (*sample.image(), columns)


def read_members(path: str) -> list[Member]:
    """The files of a tar that have an ending, with their texts; hidden ones, as macOS adds, are left out.

    Raises DamagedTar for what is no whole tar.
    """
    found = plain_members(path)
    return every_member(path) if found is None else found


class DamagedTar(ValueError):
    """A file that is no whole tar; `images` of it were there before the damage."""

    def __init__(self, path: str, error: Exception, members: int, found: list[Member]):
        super().__init__(
            f"{path} is no whole tar: {error} (after {members} files). Fetch it again or leave it out; a compressed tar "
            "must be decompressed first."
        )
        self.images = sum(split_name(member.name)[1] in IMAGES for member in found)


def plain_members(path: str) -> list[Member] | None:
    """As `every_member` at a fifth of its time, where all headers are of regular files and plain; else None."""
    found, position, start, chunk = [], 0, 0, b""
    try:
        with open(path, "rb", buffering=0) as file:
            whole, descriptor = os.fstat(file.fileno()).st_size, file.fileno()
            while position + tarfile.BLOCKSIZE <= whole:
                if position + tarfile.BLOCKSIZE > start + len(chunk):
                    start, chunk = position, os.pread(descriptor, READ, position)
                header = chunk[position - start : position - start + tarfile.BLOCKSIZE]
                if header == tarfile.NUL * tarfile.BLOCKSIZE:
                    return found
                plain = read_header(header)
                if plain is None:
                    return None
                name, size = plain
                data = position + tarfile.BLOCKSIZE
                if data + size > whole:
                    return None  # cut off: the other tells how
                stem, ending = split_name(name)
                if ending and not os.path.basename(stem).startswith("."):
                    found.append(Member(name, (data, size)))
                    if ending in COLUMNS and size <= TEXT_BYTES:
                        inside = data + size <= start + len(chunk)
                        content = (
                            chunk[data - start : data - start + size] if inside else os.pread(descriptor, size, data)
                        )
                        found[-1].columns = read_columns(ending, content)
                position = data + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    except OSError:
        return None
    return None  # no end mark


def read_header(header: bytes) -> tuple[str, int] | None:
    """Name and size by a header of a regular file, as POSIX and GNU write it; None for any other."""
    magic, size = header[257:263], header[124:136]
    if header[156:157] not in (b"0", b"\0") or magic not in (b"ustar\0", b"ustar ") or size[0] & 0x80:
        return None
    try:
        if int(header[148:156].strip(b" \0"), 8) != sum(header) - sum(header[148:156]) + 8 * 32:  # as if it held blanks
            return None
        name, length = header[:100].split(b"\0", 1)[0], int(size.strip(b" \0") or b"0", 8)
    except ValueError:
        return None
    prefix = header[345:500].split(b"\0", 1)[0] if magic == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape"), length


def every_member(path: str) -> list[Member]:
    """Files of any kind of tar, by the standard library."""
    found, members, whole = [], 0, os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:  # "r:" is a plain tar: in a compressed one nothing can be addressed
            for member in tar:
                tar.members = []  # tarfile would keep every header
                members += 1
                stem, ending = split_name(member.name)
                if not member.isfile() or not ending or os.path.basename(stem).startswith("."):
                    continue
                if member.offset_data + member.size > whole:
                    raise tarfile.ReadError(f"it ends within {member.name}")
                found.append(Member(member.name, (member.offset_data, member.size)))
                if ending in COLUMNS and member.size <= TEXT_BYTES:
                    found[-1].columns = read_columns(ending, tar.extractfile(member).read())
            if whole < tar.offset + tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it has no end mark")  # cut off between two files
    except (OSError, tarfile.TarError) as error:
        raise DamagedTar(path, error, members, found) from error
    return found


def group_neighbours(path: str, members: list[Member]) -> list[Sample]:
    """Samples of files that follow one another; one whose files lie apart is there several times."""
    names = [split_name(member.name) for member in members]
    images = {stem for stem, ending in names if ending in IMAGES}
    samples = []
    for member, (stem, ending) in zip(members, names):
        if stem not in images:
            stem = next((name for name in shorter_names(stem) if name in images), stem)
            ending = member.name[len(stem) + 1 :].lower()
        if not samples or samples[-1].stem != stem:
            samples.append(Sample(stem))
        if ending in samples[-1].files:
            raise twice(path, member.name)
        samples[-1].files[ending] = member
    return samples


def joined(path: str, places: list[Sample]) -> list[Sample]:
    """One sample of the files that lie apart; as many as there are where each place holds the same kinds of files."""
    if all(place.has_image() and place.files.keys() == places[0].files.keys() for place in places):
        return places
    whole = Sample(places[0].stem)
    for place in places:
        for ending, member in place.files.items():
            if ending in whole.files or (ending in IMAGES and whole.has_image()):  # whose is the text?
                raise twice(path, member.name)
        whole.files |= place.files
    return [whole]


def twice(path: str, name: str) -> ValueError:
    """A second file of this name: its image would get the first one's text."""
    return ValueError(
        f"{path} holds {name[:100]} twice in one sample. Give each sample a name of its own, and write the tar again."
    )


def shorter_names(stem: str) -> list[str]:
    """a/b.c.d: a/b.c and a/b."""
    folder, slash, name = stem.rpartition("/")
    parts = name.split(".")
    return [f"{folder}{slash}{'.'.join(parts[:count])}" for count in range(len(parts) - 1, 0, -1)]


def split_name(path: str) -> tuple[str, str]:
    """Name without the ending, and the ending in lower case."""
    stem, dot, ending = path.rpartition(".")
    return (stem, ending.lower()) if dot and "/" not in ending else (path, "")


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
    """The bytes of an image in a tar, of a remote one by their range."""
    if is_remote(address["tar"]):
        return read_range(address["tar"], address["offset"], address["size"])
    return os.pread(opened(address["tar"]).fileno(), address["size"], address["offset"])


@functools.lru_cache(OPEN_TARS)
def opened(path: str):
    """A tar kept open; `pread` has no position that workers forked from one process would move for one another."""
    return open(Path(path), "rb", buffering=0)
