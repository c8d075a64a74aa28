"""Images of rows: where they are, the hash of their bytes, and opening one whatever is wrong with it."""

import base64
import functools
import hashlib
import io
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import datasets
import pyarrow.compute
from PIL import Image

from modeling_blip2x.images_blip2x import open_picture, rgb_image, why_unreadable

from .rows import Rows
from .tars import read_member

MAX_PIXELS = 2**26  # 67 megapixels, 200 MB as RGB; what is larger counts as a decompression bomb
ENDS = 4096  # bytes at either end of an image that mostly tell it from others of its size
CHUNK = 2**20  # bytes of a file in memory at once while it is hashed
NO_NAME = "no name"
SHOWN = 100  # characters of a value that a report shows
LONGEST_PATH = 1024  # what is longer and looks like base64 is no path


class BadRow(ValueError):
    """A row that cannot be trained on; the message is the reason."""


def keep_encoded(rows: datasets.Dataset | Rows, image_column: str) -> datasets.Dataset | Rows:
    """Keep images as bytes or path, so that scanning rows decodes nothing and errors can name the file."""
    if not isinstance(rows, datasets.Dataset):
        return rows
    kind = rows.features[image_column]
    untyped = isinstance(kind, dict) and kind.keys() == {"bytes", "path"}  # parquet that pandas or others wrote
    if isinstance(kind, (datasets.List, datasets.LargeList)) and isinstance(kind.feature, datasets.Image):
        return rows.cast_column(image_column, type(kind)(datasets.Image(decode=False)))
    return (
        rows.cast_column(image_column, datasets.Image(decode=False))
        if untyped or isinstance(kind, datasets.Image)
        else rows
    )


def image_source(value: dict | str | None, folder: Path | None) -> tuple[io.BytesIO | Path, str]:
    """What PIL opens, and a name for messages. Raises BadRow where there is neither."""
    name, value = image_name(value, folder), plain_value(value)
    if isinstance(value, dict) and value.get("bytes"):
        return io.BytesIO(value["bytes"]), name
    if isinstance(value, dict) and "tar" in value:
        return io.BytesIO(read_member(value)), name
    if name == NO_NAME:
        raise BadRow("no image")
    return Path(name), name


def image_name(value: dict | str | None, folder: Path | None) -> str:
    """What a report calls the image; reads nothing."""
    try:
        value = plain_value(value)
    except BadRow:
        return str(value["path"] if isinstance(value, dict) else value)[:SHOWN]
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str) or not path:
        return "embedded bytes" if isinstance(value, dict) and value.get("bytes") else NO_NAME
    inside = isinstance(value, dict) and ("tar" in value or value.get("bytes"))
    return path if inside else os.path.normpath(os.path.join(folder or "", path))  # an absolute path stays


def plain_value(value: object) -> dict | str | None:
    """An image as this project holds it, of what else people have: bytes, base64 text, a `data:` URI, a list of one.

    Raises BadRow for several images, an address, or a place inside an archive.
    """
    if isinstance(value, list):
        if len(value) > 1:
            raise BadRow(f"{len(value)} images in one row, of which one is taken: make a row of each")
        return plain_value(value[0]) if value else None
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value), "path": None}
    if isinstance(value, dict) and not value.get("bytes") and "tar" not in value:
        plain_value(value.get("path"))  # refuses an address, and what lies in an archive
    if not isinstance(value, str):
        return value
    if re.match(r"(https?|ftp|s3|gs|hf)://", value, re.IGNORECASE):
        raise BadRow("it is an address, and addresses are not fetched: download the images, and name their files")
    if "::" in value and "://" in value:  # as datasets names what lies in a zip
        raise BadRow("it lies inside an archive: unpack that, and name the folder")
    encoded = re.match(r"data:[^,]*;base64,", value)
    if encoded or (len(value) >= LONGEST_PATH and re.fullmatch(r"[A-Za-z0-9+/\s]+=*\s*", value)):
        try:
            return {"bytes": base64.b64decode(value[encoded.end() if encoded else 0 :]), "path": None}
        except ValueError as error:
            raise BadRow(f"it is base64 text that cannot be decoded: {error}") from None
    return value


@contextmanager
def opened(value: dict | str | None, folder: Path | None) -> Iterator[Image.Image]:
    """An image that is not decoded yet, so that a JPEG may still be decoded smaller.

    Raises BadRow for one that is missing, empty, cut off, of no known format or of more than `MAX_PIXELS`, also where
    only decoding it within the `with` finds that out.
    """
    source, _ = image_source(value, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is the stricter limit
            image = open_picture(source)
        with image:  # closes the file of one that cannot be decoded, too
            if image.width * image.height > MAX_PIXELS:
                raise BadRow(f"decompression bomb: {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            yield image
    except BadRow:
        raise
    except Exception as error:  # a damaged file can fail in any way
        if isinstance(error, FileNotFoundError) and isinstance(source, Path):
            raise BadRow(missing(source)) from error
        raise BadRow(why_unreadable(error, source)) from error


def open_image(value: dict | str | None, folder: Path | None) -> Image.Image:
    """The upright RGB image, as the processor makes it. Raises BadRow as `opened` does."""
    with opened(value, folder) as image:
        return rgb_image(image)


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image that is there and not read yet.

    place: the file, or (tar, offset) of a tar's member; None for bytes that the rows embed.
    known_ends: the hash of both ends, where finding the image gave it.
    """

    place: str | tuple[str, int] | None
    size: int
    open: Callable[[], BinaryIO]
    known_ends: bytes | None = None

    def ends(self) -> bytes:
        """Hash of the first and the last `ENDS` bytes, which differ between compressed images."""
        if self.known_ends is not None:
            return self.known_ends
        with self.open() as file:
            start = file.read(ENDS)
            file.seek(max(len(start), self.size - ENDS))
            return hash_of(start, file.read(ENDS))

    def content(self) -> bytes:
        """Hash of all bytes: about a fiftieth of the time of decoding a JPEG, half of that of a BMP."""
        with self.open() as file:
            return hash_of(*iter(lambda: file.read(CHUNK), b""))


def hash_of(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


def find_images(images: datasets.Dataset | Rows, column: str, folder: Path | None) -> Iterator[FoundImage | BadRow]:
    """The image of each row, or what is wrong with it; looks whether files exist and how large they are."""
    embeds = isinstance(images, datasets.Dataset) and isinstance(images.features[column], datasets.Image)
    files = {}  # many rows may show one
    values = embedded_images(images, column) if embeds else ((row[column], None) for row in images)
    for row, (given, ends) in enumerate(values):
        try:
            value = plain_value(given)
        except BadRow as fault:
            yield fault
            continue
        if isinstance(value, dict) and value.get("bytes"):
            content = value["bytes"]
            again = functools.partial(embedded_bytes, images, column, row)
            yield FoundImage(None, len(content), again, ends)
        elif isinstance(value, dict) and "tar" in value:
            place = (value["tar"], value["offset"])  # a name may stand in a tar twice
            yield FoundImage(place, value["size"], functools.partial(member_bytes, value))
        else:
            name = image_name(value, folder)
            if name not in files:
                files[name] = file_of(name)
            yield files[name]


def file_of(name: str) -> FoundImage | BadRow:
    """An image in a file of its own."""
    if name == NO_NAME:
        return BadRow("no image")
    try:
        about = os.stat(name)
    except (OSError, ValueError):  # ValueError: a null character in the name
        return BadRow(missing(Path(name)))
    if not stat.S_ISREG(about.st_mode):
        return BadRow("not a regular file")
    return FoundImage(name, about.st_size, functools.partial(open, name, "rb"))


def missing(path: Path) -> str:
    """That a file is missing, and the zip beside it that most likely holds it."""
    archive = zip_in(path.parent)
    return "the file is missing" + (f", but {archive} lies there: unpack it" if archive else "")


@functools.lru_cache(1)
def zip_in(folder: Path) -> str | None:
    return min((path.name for path in folder.glob("*.zip")), default=None)


def embedded_images(images: datasets.Dataset, column: str) -> Iterator[tuple[dict, bytes | None]]:
    """Path and bytes of each row, with the hash of both ends, for which no more is read of rows on disk: these are
    memory-mapped, and the bytes a view of them."""
    for table in images.with_format("arrow").iter(1000):
        for values in table[column].chunks:  # joining them would copy the images
            paths, contents = (pyarrow.compute.struct_field(values, name) for name in ("path", "bytes"))
            for path, content in zip(paths.to_pylist(), contents, strict=True):
                view = memoryview(content.as_buffer()) if content.is_valid else memoryview(b"")
                yield {"path": path, "bytes": view}, hash_of(view[:ENDS], view[max(ENDS, len(view) - ENDS) :])


def embedded_bytes(images: datasets.Dataset | Rows, column: str, row: int) -> io.BytesIO:
    return io.BytesIO(plain_value(images[row][column])["bytes"])


def member_bytes(address: dict) -> io.BytesIO:
    return io.BytesIO(read_member(address))
