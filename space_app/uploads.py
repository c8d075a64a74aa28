"""Uploads become pictures here, or a sentence that says why not.

Only files that Gradio took in are opened (its own check, before `preprocess`), and only here: size on disk, format and
dimensions are checked before a pixel is decoded.
"""

import os
import warnings
from pathlib import Path

import gradio as gr
import numpy as np
from gradio.components.gallery import GalleryData
from gradio_client.utils import is_http_url_like
from mistakes import Mistake
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import model_validator

Image.init()  # all of Pillow's readers, so that those of FORMATS are there
FORMATS = [name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF") if name in Image.OPEN]
MEGABYTE = 2**20  # as Gradio counts, whose page says "20.0 MB"
MAX_MEGABYTES = float(os.environ.get("BLIP2X_MAX_MEGABYTES", "20"))
MAX_MEGAPIXELS = float(os.environ.get("BLIP2X_MAX_MEGAPIXELS", "40"))
MAX_IMAGES = 64  # in a gallery
LARGEST_SIDE = 1024  # pixels kept: towers see 224 to 490, and pages show no more


def open_upload(path: str | Path) -> Image.Image:
    """The picture in a file: upright, RGB, at most 1024 pixels a side.

    Raises:
        Mistake: too large on disk or in pixels, cut off, or not a picture.
    """
    megabytes = os.path.getsize(path) / MEGABYTE
    if megabytes > MAX_MEGABYTES:
        raise Mistake(f"This file has {megabytes:.1f} MB; at most {MAX_MEGABYTES:g} MB are taken. Send a smaller one.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            opened = Image.open(path, formats=FORMATS)
        with opened as image:
            _check_size(image)
            image.draft("RGB", (2 * LARGEST_SIDE, 2 * LARGEST_SIDE))  # JPEG decodes at a fraction of its size
            picture = in_colours(upright(image))
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.BICUBIC)
        return on_white(picture)
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


def _check_file(file) -> str:
    if file.url and file.url.startswith("data:"):
        raise Mistake("Send the picture as a file, not as a data address.")
    if not file.path:
        raise Mistake("There is no picture. Upload one, paste one, or choose an example.")
    return file.path


def _check_resource(path: str | None) -> None:
    """Raises Mistake for an address, which Gradio would fetch for a client of the API."""
    if path is not None and is_http_url_like(str(path)):
        raise Mistake("Addresses are not fetched. Send the picture itself.")


class ImageUpload(gr.Image):
    """gr.Image whose value in functions is a checked PIL image, or None."""

    is_template = True  # on the page it is a gr.Image

    async def async_move_resource_to_block_cache(self, url_or_file_path):
        _check_resource(url_or_file_path)
        return await super().async_move_resource_to_block_cache(url_or_file_path)

    def preprocess(self, payload):
        return None if payload is None else open_upload(_check_file(payload))


class Pictures(GalleryData):
    """A gallery's value. Clients may send what comes to mind: [file, ...] or [(file, caption), ...]."""

    @model_validator(mode="before")
    @classmethod
    def in_full(cls, sent):
        return [_entry(one) for one in sent] if isinstance(sent, list) else sent


def _entry(sent):
    """{"image": file, "caption": ...}, as a gallery writes it."""
    if isinstance(sent, (list, tuple)) and len(sent) == 2:
        return {"image": sent[0], "caption": sent[1]}
    return {"image": sent} if isinstance(sent, dict) and "path" in sent else sent


class GalleryUpload(gr.Gallery):
    """gr.Gallery whose value in functions is a list of checked PIL images."""

    is_template = True
    data_model = Pictures

    async def async_move_resource_to_block_cache(self, url_or_file_path):
        _check_resource(url_or_file_path)
        return await super().async_move_resource_to_block_cache(url_or_file_path)

    def preprocess(self, payload):
        entries = [] if payload is None else payload.root
        if len(entries) > MAX_IMAGES:
            raise Mistake(f"These are {len(entries)} pictures; at most {MAX_IMAGES} are taken at once.")
        if any(not hasattr(entry, "image") for entry in entries):
            raise Mistake("Videos are not taken. Send pictures.")
        return [open_upload(_check_file(entry.image)) for entry in entries]
