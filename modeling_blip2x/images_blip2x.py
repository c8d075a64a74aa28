"""Any picture as an upright 8-bit RGB PIL image: how training, evaluation and the processor all read pictures.

Transparent pixels show white, as on paper. Where the range of the levels is unclear, an error says so: nothing is guessed.
"""

import io
import os
import stat
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# What Pillow decodes itself and knows by its first bytes. EPS and WMF, which it hands to other programs, are not here.
# HEIF is read where the package pillow-heif has been registered.
FORMATS = "JPEG PNG WEBP GIF BMP TIFF AVIF JPEG2000 MPO PPM DIB ICO QOI HEIF".split()
BY_OTHER_PROGRAMS = ("EPS", "WMF")  # of which Pillow draws a picture that it has opened by Ghostscript or by Windows
CHANNELS = (1, 3, 4)
UNCLEAR = 3  # floats whose largest is from 1 to here may be fractions that overshot, or normalised pixels
HALF_LEVEL = 0.5 / 255  # what rounding to 8 bits takes away


def rgb_image(source) -> Image.Image:
    """The picture as a new RGB image, upright by its EXIF data, on white where it is transparent.

    Args:
        source: one of
            - a PIL image of any mode;
            - a path (str or path-like) of a regular file, or a file's bytes, in one of `FORMATS`;
            - {"bytes", "path"}, as `datasets` keeps a picture: its bytes, or where there are none its path;
            - a numpy array or a tensor: (H, W), (H, W, C) or (C, H, W) of C = 1, 3 (RGB) or 4 (RGBA) channels. Where both
              ends could be channels, as in (3, W, 3), an array is (H, W, C) and a tensor (C, H, W), as torchvision's.

    Levels of arrays, and of PIL's modes I;16, I (integers) and F (floats):
        - bool: white where true. uint8: 0 to 255.
        - uint16: 0 to 65535; not all below 256, which would be black and is more likely of 8 bits.
        - other integers: 0 to 255, or where any is larger 0 to 65535.
        - floats: 0 to 1, or where any is larger 0 to 255; the largest not between 1 and 3, which could be either.

    Raises:
        ValueError: a file that is missing, cut off or no picture; a PIL image of EPS or WMF; a shape or levels that are none of these.
        TypeError: a source that is none of these.
    """
    if isinstance(source, dict):
        source = _of_dict(source)
    if isinstance(source, Image.Image):
        if source.format in BY_OTHER_PROGRAMS:
            raise ValueError(
                f"The {source.format} image of {source.width} x {source.height} would be drawn by another program. Give a "
                f"picture in one of {', '.join(FORMATS)}."
            )
        try:
            source.load()
        except Exception as error:  # it was opened, but not decoded yet
            raise ValueError(
                f"The {source.format or 'PIL'} image of {source.width} x {source.height} pixels cannot be decoded: "
                f"{type(error).__name__}: {error}"
            ) from error
        if 0 in source.size:
            raise ValueError(f"An image is {source.width} x {source.height} pixels large, which holds none.")
        return _of_image(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _of_file(io.BytesIO(source), f"The image in {len(source)} bytes")
    if isinstance(source, (str, os.PathLike)):
        return _of_file(source, f"The image {os.fspath(source)!r}")
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        values = (source.float() if source.is_floating_point() else source).numpy()  # numpy has no bfloat16
        return _of_array(values, channels_first=True)
    if isinstance(source, np.ndarray):
        return _of_array(source, channels_first=False)
    raise TypeError(
        f"An image is a {type(source).__name__}: {source!r:.100}. Give a PIL image, a path, bytes, a numpy array, a tensor, or "
        "a dictionary of bytes and path."
    )


def open_picture(file: str | os.PathLike | BinaryIO) -> Image.Image:
    """A picture that is not decoded yet: PIL's open, of regular files (a pipe would never end) and `FORMATS` alone.

    Raises what PIL raises; `why_unreadable` puts it in words.
    """
    if isinstance(file, (str, os.PathLike)) and not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("not a regular file")
    Image.init()  # registers all readers once; a build of Pillow may lack some
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def why_unreadable(error: Exception, file: str | os.PathLike | BinaryIO) -> str:
    """What was wrong with a picture that could not be opened or decoded."""
    if isinstance(error, FileNotFoundError):
        return "the file is missing"
    if isinstance(error, UnidentifiedImageError):
        empty = os.stat(file).st_size == 0 if isinstance(file, (str, os.PathLike)) else file.seek(0, io.SEEK_END) == 0
        known = f"no known image format ({', '.join(FORMATS)}), or a kind of one that Pillow does not read"
        return "the file is empty" if empty else known
    if isinstance(error, Image.DecompressionBombError):
        return f"decompression bomb: {error}"
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


def orientation_of(image: Image.Image) -> int:
    """How EXIF says that the picture lies, 1 to 8: 1 upright, 5 and above on a side. Damaged data turn nothing."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # however they are damaged, the pixels may be sound
        return 1
    return found if found in range(1, 9) else 1


def _of_dict(source: dict):
    """Bytes, or where there are none a path."""
    if not source.keys() & {"bytes", "path"}:
        raise ValueError(f"An image is a dictionary of {', '.join(map(repr, source))}. Give it bytes or a path.")
    found = source.get("bytes") or source.get("path")
    if not found:
        raise ValueError("An image is a dictionary with neither bytes nor a path. Give one of them.")
    return found


def _of_file(file: str | os.PathLike | BinaryIO, name: str) -> Image.Image:
    try:
        with open_picture(file) as image:
            return _of_image(image)
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{name} cannot be read: {why_unreadable(error, file)}") from error


def _of_image(image: Image.Image) -> Image.Image:
    if orientation_of(image) != 1:  # exif_transpose would copy the others
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if image.mode == "I" and image.format == "PPM":
            values = values.astype(np.uint16)  # PIL reads 16 bits into 32
        grey = Image.fromarray(_to_levels(values, f"a PIL image of mode {image.mode}"))
        if image.info.get("transparency") is not None:
            grey.paste(255, mask=Image.fromarray(values == image.info["transparency"]))
        return grey.convert("RGB")
    if image.has_transparency_data:
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """RGB of an image with alpha, or with a colour or palette entry that stands for transparent."""
    hidden = image.info.get("transparency")
    if isinstance(hidden, tuple) and max(hidden) > 255:
        image = image.copy()  # the caller's stays as it is
        image.info["transparency"] = tuple(level >> 8 for level in hidden)  # PIL has made 8 bits of the pixels alone
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _of_array(values: np.ndarray, channels_first: bool) -> Image.Image:
    what = f"an array of shape {values.shape} and dtype {values.dtype}"
    if values.size == 0:
        raise ValueError(f"An image is {what}, which holds no pixel.")
    if values.ndim == 3:
        first, last = values.shape[0] in CHANNELS, values.shape[2] in CHANNELS
        if first and (channels_first or not last):
            values = values.transpose(1, 2, 0)
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in CHANNELS):
        raise ValueError(
            f"An image is {what}. Give (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels; of a batch a list of images."
        )
    levels = _to_levels(values, what)
    if levels.ndim == 3 and levels.shape[2] == 1:
        levels = levels[..., 0]
    return _of_image(Image.fromarray(np.ascontiguousarray(levels)))


def _to_levels(values: np.ndarray, what: str) -> np.ndarray:
    """uint8 levels of an array; its type and range say what is white, as in `rgb_image`."""
    kind = values.dtype.kind
    if values.dtype == np.uint8:
        return values
    if kind == "b":
        return values * np.uint8(255)
    if kind not in "iuf":
        raise ValueError(f"An image is {what}, which holds no levels. Give integers or floats.")
    if kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"An image is {what} with NaN or infinite values. Replace them, as by numpy.nan_to_num.")
    low, high = values.min().item(), values.max().item()
    spans = f"An image is {what} with values from {low:g} to {high:g}"
    if kind == "f":
        if -HALF_LEVEL <= low and high <= 1 + HALF_LEVEL:
            return np.rint(values.clip(0, 1) * 255).astype(np.uint8)
        if -0.5 <= low and UNCLEAR < high <= 255.5:
            return np.rint(values.clip(0, 255)).astype(np.uint8)
        raise ValueError(
            f"{spans}. Floats are levels of 0 to 1, or of 0 to 255: undo a normalisation, clip what resizing overshot, or scale."
        )
    if low < 0 or high > 65535:
        raise ValueError(f"{spans}. Integers are levels of 0 to 255 or 0 to 65535: scale them, as to numpy.uint8.")
    if values.dtype.itemsize == 2 and kind == "u" and 0 < high <= 255:
        raise ValueError(f"{spans} of 65535, which is black. If they are levels of 0 to 255, make them numpy.uint8.")
    if high <= 255:
        return values.astype(np.uint8)
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
