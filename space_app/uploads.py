"""Uploads become pictures here, or a sentence that says why not.

Only files that were uploaded are opened, and only here: where they lie, size on disk, format and dimensions, of all pictures
of a request, are checked before a pixel is decoded.
"""

import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import numpy as np
from gradio.data_classes import FileData, GradioModel, GradioRootModel
from mistakes import UNREADABLE, Mistake
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import model_validator

Image.init()  # all of Pillow's readers, so that those of FORMATS are there
FORMATS = [name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF") if name in Image.OPEN]
MEGABYTE = 2**20  # as Gradio counts, whose page says "20.0 MB"
MAX_MEGABYTES = float(os.environ.get("BLIP2X_MAX_MEGABYTES", "20"))
MAX_MEGAPIXELS = float(os.environ.get("BLIP2X_MAX_MEGAPIXELS", "40"))
MAX_REQUEST_MEGAPIXELS = 5 * MAX_MEGAPIXELS  # of all pictures of a request
MAX_KEPT = float(os.environ.get("BLIP2X_MAX_KEPT_MEGABYTES", "2000")) * MEGABYTE  # uploads and results together
FULL = "The Space has no room for more pictures now. Send this again in an hour, when it has let the oldest go."
MAX_IMAGES = 64  # in a gallery
DECODING = threading.BoundedSemaphore(2)  # pictures at once: the largest take half a gigabyte while they are decoded
LARGEST_SIDE = 1024  # pixels kept: towers see 224 to 490, and pages show no more


def open_upload(path: str | Path) -> Image.Image:
    """The picture in a file: upright, RGB, at most 1024 pixels a side.

    Raises:
        Mistake: too large on disk or in pixels, cut off, or not a picture.
    """
    with DECODING, _reading(path) as image:
        image.draft("RGB", (2 * LARGEST_SIDE, 2 * LARGEST_SIDE))  # JPEG decodes at a fraction of its size
        picture = in_colours(upright(image))
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.BICUBIC)
        return on_white(picture)


def megapixels(path: str | Path) -> float:
    """Of the picture in a file, as its header says. Raises Mistake as `open_upload` does."""
    with _reading(path) as image:
        return image.width * image.height / 1e6


@contextmanager
def _reading(path: str | Path) -> Iterator[Image.Image]:
    """The picture in a file, its header read and found to be small enough; what goes wrong with it is a Mistake."""
    megabytes = os.path.getsize(path) / MEGABYTE
    if megabytes > MAX_MEGABYTES:
        raise Mistake(f"This file has {megabytes:.1f} MB; at most {MAX_MEGABYTES:g} MB are taken. Send a smaller one.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            opened = Image.open(path, formats=FORMATS)
        with opened as image:
            _check_size(image)
            yield image
    except Mistake:  # a ValueError
        raise
    except UnidentifiedImageError as error:
        raise Mistake("This file is not a picture. Send a JPEG, PNG, WebP, GIF, BMP or AVIF file.") from error
    except Image.DecompressionBombError as error:
        raise Mistake(
            f"This picture has far too many pixels; at most {MAX_MEGAPIXELS:g} megapixels are taken."
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise
        raise Mistake("This picture is damaged or cut off. Save it again and send it once more.") from error


def _check_size(image: Image.Image) -> None:
    megapixels = image.width * image.height / 1e6
    if megapixels > MAX_MEGAPIXELS:
        raise Mistake(
            f"This picture has {megapixels:.0f} megapixels ({image.width} x {image.height}); at most "
            f"{MAX_MEGAPIXELS:g} are taken. Send a smaller one."
        )


def upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF data that are damaged in any way; the pixels are sound
        return image


def in_colours(image: Image.Image) -> Image.Image:
    """8-bit RGB, or RGBA where a part may be transparent: palettes and 16 bits could not be shrunk.

    The pixels are those of `modeling_blip2x.images_blip2x`, which is not there to import where a checkpoint carries its code.
    """
    hidden = image.info.get("transparency")
    if image.mode.startswith("I"):  # grey PNG of 16 bits
        levels = np.asarray(image)
        if 0 < levels.max() <= 255:
            raise Mistake(
                "This picture has 16 bits a pixel and is all but black. Save it with 8 bits and send it again."
            )
        image = Image.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8))
        if hidden is not None:
            image.putalpha(Image.fromarray(np.uint8(255) * (levels != hidden)))
    elif isinstance(hidden, tuple) and max(hidden) > 255:
        image.info["transparency"] = tuple(level >> 8 for level in hidden)  # Pillow has made 8 bits of the pixels alone
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode)


def on_white(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white, as on paper."""
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def open_image(sent: dict | None) -> Image.Image:
    """The picture of an image component, as it was sent: {"path": file that was uploaded, ...}.

    Raises:
        Mistake: nothing sent, a file that was not uploaded or is gone, or what `open_upload` refuses.
    """
    if sent is None:
        raise Mistake("There is no picture. Upload one, paste one, or choose an example.")
    _check_room()
    return open_upload(check_upload(sent))


def _check_room() -> None:
    """What is made of a picture is kept as well."""
    if bytes_kept() > MAX_KEPT:
        raise Mistake(FULL)


def check_upload(sent: object) -> Path:
    """Where the file lies, links followed, that a client names: {"path": file that was uploaded, ...}.

    Raises:
        Mistake: anything but a regular file in the folder of uploads. Of what lies elsewhere it says nothing.
    """
    path, url = (sent.get(name) if isinstance(sent, dict) else None for name in ("path", "url"))
    if str(url).startswith("data:"):
        raise Mistake("Send the picture as a file, not as a data address.")
    if not was_uploaded(path):
        raise Mistake(UNREADABLE)
    if not os.path.isfile(path):  # gone, or a folder or pipe, which would be waited for
        raise Mistake("This picture is no longer here: uploads are kept for a time only. Send it again.")
    return Path(path).resolve()


def open_images(sent: list | None) -> list[Image.Image]:
    """The pictures of a gallery, as they were sent. Raises Mistake as `open_image`, and for too many, or a video."""
    entries = sent or []
    if len(entries) > MAX_IMAGES:
        raise Mistake(f"These are {len(entries)} pictures; at most {MAX_IMAGES} are taken at once.")
    if any(entry["video"] for entry in entries):
        raise Mistake("Videos are not taken. Send pictures.")
    _check_room()
    paths = [check_upload(entry["image"]) for entry in entries]
    total = sum(map(megapixels, paths))
    if total > MAX_REQUEST_MEGAPIXELS:
        raise Mistake(
            f"These pictures have {total:.0f} megapixels together; at most {MAX_REQUEST_MEGAPIXELS:g} are taken at once. Send "
            "fewer, or smaller ones."
        )
    return [open_upload(path) for path in paths]


def was_uploaded(path: object) -> bool:
    """Whether a path leads, links followed, to the folder of uploads."""
    try:
        return isinstance(path, str) and Path(path).resolve().is_relative_to(upload_folder().resolve())
    except (OSError, ValueError):  # no path at all, as one with a zero byte
        return False


def upload_folder() -> Path:
    """Where Gradio puts uploads and results, as its documentation of GRADIO_TEMP_DIR says."""
    named = os.environ.get("GRADIO_TEMP_DIR")
    return Path(named) if named else Path(tempfile.gettempdir()) / "gradio"


def bytes_kept() -> int:
    """Size of the folder of uploads; a file counts for 64 KB at least, since small ones take room and time as well."""
    total = 0
    for folder, _, names in os.walk(upload_folder()):
        for name in names:
            try:
                total += max(os.lstat(os.path.join(folder, name)).st_size, 2**16)
            except OSError:  # swept in the meantime
                continue
    return total


class Entry(GradioModel):
    """A picture of a gallery; that it may be a video too is Gradio's format."""

    image: FileData | None = None
    video: FileData | None = None
    caption: str | None = None

    @model_validator(mode="after")
    def is_something(self):
        if self.image is None and self.video is None:
            raise ValueError("An entry of a gallery is neither an image nor a video.")
        return self


class Entries(GradioRootModel):
    """A gallery's value. Clients may send what comes to mind: [file, ...] or [(file, caption), ...]."""

    root: list[Entry]

    @model_validator(mode="before")
    @classmethod
    def in_full(cls, sent):
        return [_entry(one) for one in sent] if isinstance(sent, list) else sent


def _entry(sent):
    """{"image": file, "caption": ...}, as a gallery writes it."""
    if isinstance(sent, (list, tuple)) and len(sent) == 2:
        return {"image": sent[0], "caption": sent[1]}
    return {"image": sent} if isinstance(sent, dict) and "path" in sent else sent


class Gallery(gr.Gallery):
    """gr.Gallery that takes plain lists of files. Its name is its parent's, by which the page finds how to show it."""

    data_model = Entries
