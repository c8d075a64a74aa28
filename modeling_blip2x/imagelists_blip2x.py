"""The ways to hand over images: one, a list, or a list for each text; as pixels, files, addresses or base64."""

import base64
import binascii
import http.client
import os
import urllib.request

import numpy as np
import torch
from PIL import Image

from .images_blip2x import rgb_image

SECONDS = 60  # to wait for an address that does not answer


def list_images(images) -> tuple[list, bool]:
    """(images, False): a flat list of one or more images; or (rows, True): a list of images for each text.

    Args:
        images: one image, or any iterable of images (list, tuple, generator, batch array (N, ...), column of a data set),
            or of iterables of images.

    Raises:
        ValueError: None for an image, or single images beside lists of them, naming the place.
    """
    if _is_one(images):
        return [images], False
    items = list(images)
    if items and not any(item is None or _is_one(item) for item in items):
        rows = [list(item) for item in items]
        for number, row in enumerate(rows):
            _check(row, f"images[{number}]")
        return rows, True
    _check(items, "images")
    return items, False


def _check(images: list, name: str) -> None:
    """That a list holds images alone."""
    for number, image in enumerate(images):
        if image is None:
            raise ValueError(
                f"{name}[{number}] is None. Leave it out; of a text without images give [], as in [[a], []]."
            )
    for number, image in enumerate(images):
        if not _is_one(image):
            raise ValueError(
                f"{name}[{number}] is a {type(image).__name__}, not an image like those beside it. Pass images alone, or a "
                "list of images for each text: [[a, b], [c]]."
            )


def _is_one(image) -> bool:
    """Whether this is an image, not something that holds images. What is neither, `rgb_image` refuses."""
    if isinstance(image, np.ndarray):
        return image.ndim < 4 and image.dtype.kind not in "OSU"  # objects or paths
    if isinstance(image, torch.Tensor):
        return image.ndim < 4
    kinds = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image, dict)
    return isinstance(image, kinds) or hasattr(image, "read") or not hasattr(image, "__iter__")


def open_image(image, name: str, as_it_is: bool) -> Image.Image | np.ndarray | torch.Tensor:
    """An image as `rgb_image` gives it, also of an address (http, https), base64 (data: or bare), or an open file.

    Args:
        name: its place, for errors. as_it_is: leave an array or a tensor alone.

    Raises:
        ValueError, TypeError: as `rgb_image` does, and for an address that does not answer.
    """
    if as_it_is and isinstance(image, (np.ndarray, torch.Tensor)):
        return image
    try:
        return rgb_image(_content(image))
    except (ValueError, TypeError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{name}: {error}") from error


def _content(image):
    """What `rgb_image` takes: the bytes behind an address, base64 or an open file; anything else as it is."""
    if hasattr(image, "read") and not isinstance(image, Image.Image):
        return image.read()
    if not isinstance(image, str):
        return image
    if image.startswith(("http://", "https://")):
        # Some servers turn away Python's own name.
        request = urllib.request.Request(image, headers={"User-Agent": "Mozilla/5.0 (compatible; blip2x)"})
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"the image {image!r} cannot be fetched: {error}") from error
    if image.startswith("data:"):
        return base64.b64decode(image.partition(",")[2])
    if os.path.exists(image):
        return image
    try:
        return base64.b64decode("".join(image.split()), validate=True)
    except (binascii.Error, ValueError):
        return image  # a path to nothing, of which `rgb_image` tells
