"""Image processors: loading one, and the size of the pixels it gives."""

import torch
from transformers import AutoImageProcessor

from modeling_blip2x import Blip2xProcessor


def load_image_processor(source: str, image_size: int | None):
    """The image processor of a tower or checkpoint folder; `image_size` resizes to that square without cropping."""
    try:
        loaded = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{source} has no image processor ({error}). Give a folder or id with preprocessor_config.json."
        ) from error
    if image_size is not None:
        resize_to(loaded, image_size)
    return loaded


def resize_to(image_processor, side: int) -> None:
    """Let an image processor resize to a square, without cropping."""
    size = {"height": side, "width": side}
    image_processor.size = size if isinstance(image_processor.size, dict) else type(image_processor.size)(**size)
    image_processor.do_center_crop = False


def output_size(image_processor) -> tuple[int, int]:
    """(height, width) of the pixels an image processor gives."""
    crop = getattr(image_processor, "crop_size", None) if getattr(image_processor, "do_center_crop", False) else None
    size = dict(crop or image_processor.size)
    side = size.get("shortest_edge")
    height, width = size.get("height") or side, size.get("width") or side
    if not height or not width:
        raise ValueError(f"The image processor's size {size} does not tell height and width. Pass --image_size.")
    return height, width


def has_other_size(model: torch.nn.Module, processor: Blip2xProcessor) -> bool:
    """Whether the processor's images are of another size than the tower was trained at."""
    size = getattr(model.config.vision_config, "image_size", None)
    if size is None:
        return False  # a CNN takes any
    native = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    return output_size(processor.image_processor) != native
