"""Images of rows: where they are, which rows show the same one, and opening one whatever is wrong with it."""

import hashlib
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow.compute
from PIL import Image

from modeling_blip2x.images_blip2x import open_picture, rgb_image, why_unreadable

from .rows import Rows
from .tars import read_member

MAX_PIXELS = 2**26  # 67 megapixels, 200 MB as RGB; what is larger counts as a decompression bomb
ENDS = 4096  # bytes at either end of an embedded image that tell it from others of its length
NO_NAME = "no name"


class BadRow(ValueError):
    """A row that cannot be trained on; the message is the reason."""


def keep_encoded(rows: datasets.Dataset | Rows, image_column: str) -> datasets.Dataset | Rows:
    """Keep images as bytes or path, so that scanning rows decodes nothing and errors can name the file."""
    if not isinstance(rows, datasets.Dataset):
        return rows
    kind = rows.features[image_column]
    untyped = isinstance(kind, dict) and kind.keys() == {"bytes", "path"}  # parquet that pandas or others wrote
    return (
        rows.cast_column(image_column, datasets.Image(decode=False))
        if untyped or isinstance(kind, datasets.Image)
        else rows
    )


def image_source(value: dict | str | None, folder: Path | None) -> tuple[io.BytesIO | Path, str]:
    """What PIL opens, and a name for messages. Raises BadRow where there is neither."""
    name = image_name(value, folder)
    if isinstance(value, dict) and value.get("bytes"):
        return io.BytesIO(value["bytes"]), name
    if isinstance(value, dict) and "tar" in value:
        return io.BytesIO(read_member(value)), name
    if name == NO_NAME:
        raise BadRow("no image")
    return Path(name), name


def image_name(value: dict | str | None, folder: Path | None) -> str:
    """What a report calls the image; reads nothing."""
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str) or not path:
        return "embedded bytes" if isinstance(value, dict) and value.get("bytes") else NO_NAME
    inside = isinstance(value, dict) and ("tar" in value or value.get("bytes"))
    return path if inside else os.path.normpath(os.path.join(folder or "", path))  # an absolute path stays


def image_mark(value: dict | str | None, folder: Path | None) -> bytes:
    """What tells an image from others of a data set: its name and size in bytes, its content where it has no name."""
    if isinstance(value, dict) and value.get("bytes"):
        name, size = value.get("path"), len(value["bytes"])
        if not name:
            return value["bytes"]
    elif isinstance(value, dict) and "tar" in value:
        name, size = value["path"], value["size"]
    else:
        name = image_name(value, folder)
        size = Path(name).stat().st_size if Path(name).exists() else None
    return f"{Path(name).name} {size}\n".encode("utf-8", "surrogatepass")


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
        raise BadRow(why_unreadable(error, source)) from error


def open_image(value: dict | str | None, folder: Path | None) -> Image.Image:
    """The upright RGB image, as the processor makes it. Raises BadRow as `opened` does."""
    with opened(value, folder) as image:
        return rgb_image(image)


def image_keys(images: datasets.Dataset | Rows, column: str, folder: Path | None) -> Iterator[str | BadRow]:
    """For each row something equal for equal images, or what is wrong; reads no image, looks whether files exist.

    A file's path; a member's name and tar; of embedded bytes their number and a hash of both ends, since names of files
    from several folders repeat in parquet.
    """
    embedded = isinstance(images, datasets.Dataset) and isinstance(images.features[column], datasets.Image)
    there = {}  # many rows may show one file
    for value, key in embedded_images(images, column) if embedded else ((row[column], None) for row in images):
        name = key or image_name(value, folder)
        inside = key is not None or (isinstance(value, dict) and ("tar" in value or value.get("bytes")))
        if not inside and name not in there:
            there[name] = name != NO_NAME and os.path.exists(name)
        if inside or there[name]:
            yield name
        else:
            yield BadRow("no image" if name == NO_NAME else "the file is missing")


def embedded_images(images: datasets.Dataset, column: str) -> Iterator[tuple[dict, str | None]]:
    """(`{"path"}`, key of the bytes or None) of each row; touches both ends of the bytes only, which are memory-mapped."""
    for table in images.with_format("arrow").iter(1000):
        values = table[column].combine_chunks()
        paths, contents = (pyarrow.compute.struct_field(values, name) for name in ("path", "bytes"))
        for path, content in zip(paths.to_pylist(), contents, strict=True):
            key = None
            if content.is_valid and content.as_buffer().size:
                view = memoryview(content.as_buffer())
                digest = hashlib.sha256(view[:ENDS])
                digest.update(view[-ENDS:])
                key = f"{len(view)} bytes {digest.hexdigest()}"
            yield {"path": path}, key


def number_images(keys: list[str | BadRow], ids: list | None, known: dict) -> list[int]:
    """A number for each row, the same for rows with an equal key or an equal id; -1 for bad rows.

    `known` keeps what was numbered before, for data sets that show the same files.
    """
    numbers, count = [], max(known.values(), default=-1) + 1
    for row, key in enumerate(keys):
        if isinstance(key, BadRow):
            numbers.append(-1)
            continue
        named = (key,) if ids is None or ids[row] is None else (key, ("id", ids[row]))
        number = next((known[name] for name in named if name in known), count)
        count = max(count, number + 1)
        for name in named:
            known.setdefault(name, number)
        numbers.append(number)
    return numbers
