"""Loads checkpoints through transformers' Auto classes, and says what they can do.

A stage-2 checkpoint has a language model and answers; a stage-1 checkpoint scores images and texts, and captions by its
ITG head. Several may be named: each serves the tabs that it can.
"""

import hashlib
import importlib.util
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

QUICKSTART = Path("runs") / "quickstart"
REMEMBERED = 64  # encoded images, so that a second question or search does not run the tower again
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONVERTIBLE = ("blip-2", "instructblip")  # what modeling_blip2x.convert reads
QUANTIZATIONS = ("none", "8bit", "4bit")
NO_LANGUAGE_MODEL = (
    "This checkpoint has no language model (it is of stage 1), so it cannot answer questions. It captions by its ITG head; "
    "load a stage-2 checkpoint to chat."
)
NO_SCORES = (
    "This checkpoint cannot score images against texts (it is of stage 2, whose contrastive and matching heads were left "
    "behind). Load its stage-1 checkpoint beside it to match and search."
)


@dataclass
class Part:
    """One loaded checkpoint. name: what visitors read; source: folder or hub id."""

    name: str
    source: str
    model: PreTrainedModel
    processor: ProcessorMixin
    quantization: str = "none"
    seen: OrderedDict = field(default_factory=OrderedDict)
    _seeing: threading.Lock = field(default_factory=threading.Lock)  # threads that see at once share `seen`

    @property
    def has_language_model(self) -> bool:
        return self.model.config.text_config is not None

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """pixel_values (n, 3, height, width) as the model sees them."""
        batch = self.processor.image_processor(list(images), return_tensors="pt")
        return batch["pixel_values"].to(self.model.device)

    @torch.no_grad()
    def see(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Features (n, N, D) of the vision tower. Those of the last images are remembered by content."""
        keys = [hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest() for image in images]
        with self._seeing:
            new = {key: image for key, image in zip(keys, images) if key not in self.seen}
            found = {key: self.seen[key] for key in keys if key in self.seen}
            if new:
                features = self.model.get_image_features(self.pixels(list(new.values()))).last_hidden_state
                # Copies: a row of a batch would keep the whole batch in memory.
                found |= {key: row.clone() for key, row in zip(new, features)}
            for key in keys:
                self.seen[key] = found[key]
                self.seen.move_to_end(key)
            while len(self.seen) > REMEMBERED:
                self.seen.popitem(last=False)
        return torch.stack([found[key] for key in keys])


@dataclass
class Models:
    """What the demo has. speaker: stage 2, or None; matcher: stage 1, or None."""

    speaker: Part | None
    matcher: Part | None

    @property
    def captioner(self) -> Part:
        return self.speaker or self.matcher

    @property
    def parts(self) -> list[Part]:
        return [part for part in (self.speaker, self.matcher) if part is not None]


def find_checkpoints(named: list[str]) -> list[str]:
    """Folders or hub ids to load: those named, a quickstart output standing for its stages; else the quickstart output of
    this clone, whatever folder the app is started from.

    Raises:
        ValueError: nothing named, and no quickstart output; says how to get one.
    """
    if named:
        return [checkpoint for name in named for checkpoint in _stages_of(Path(name)) or [name]]
    stages = _stages_of(Path(__file__).resolve().parent.parent / QUICKSTART)
    if stages:
        return stages
    raise ValueError(
        "No model: run `make demo` to train a toy in minutes, or name one, --model FOLDER_OR_HUB_ID (or BLIP2X_MODEL)."
    )


def _stages_of(folder: Path) -> list[str]:
    if (folder / "config.json").exists():
        return []
    return [str(folder / stage) for stage in ("stage2", "stage1") if (folder / stage / "config.json").exists()]


def load_models(
    checkpoints: list[str], device: str = "auto", dtype: str = "auto", quantization: str = "none"
) -> Models:
    """Loads each checkpoint for the role it can fill.

    Args:
        device: auto, cpu, cuda, cuda:1, mps. dtype: auto (as saved), float32, bfloat16, float16.
        quantization: none, 8bit or 4bit (bitsandbytes, on a GPU).

    Raises:
        ValueError: an option or a checkpoint that is not usable, with the fix.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization is {quantization!r}; choose one of {', '.join(QUANTIZATIONS)}.")
    device = _device(device)
    if quantization != "none" and not device.startswith("cuda"):
        raise ValueError(f"quantization {quantization} needs a GPU, and the device is {device}. Set it to none.")
    roles: dict[str, Part] = {}
    for checkpoint in checkpoints:
        part = load_part(checkpoint, device, dtype, quantization)
        role = "speaker" if part.has_language_model else "matcher"
        if role in roles:
            stage = "stage-2" if part.has_language_model else "stage-1"
            raise ValueError(
                f"{roles[role].source} and {checkpoint} are both {stage} checkpoints. Name one of each stage."
            )
        roles[role] = part
    return Models(roles.get("speaker"), roles.get("matcher"))


def load_part(checkpoint: str, device: str, dtype: str, quantization: str) -> Part:
    """One checkpoint with its processor; arguments as of `load_models`, which checks them."""
    # Where the package is absent, the checkpoint carries the code; the operator who names it trusts it.
    carried = importlib.util.find_spec("modeling_blip2x") is None
    if not carried:
        importlib.import_module("modeling_blip2x")  # registers the classes
    _check(_read_config(checkpoint), checkpoint, carried)
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=carried)
    auto_class = AutoModelForPreTraining if config.text_config is None else AutoModelForImageTextToText
    options = {"dtype": DTYPES[dtype]}
    if quantization != "none":
        quantized = BitsAndBytesConfig(load_in_8bit=quantization == "8bit", load_in_4bit=quantization == "4bit")
        options |= {"quantization_config": quantized, "device_map": {"": device}}
    model = auto_class.from_pretrained(checkpoint, trust_remote_code=carried, **options).eval()
    if quantization == "none":
        model.to(device)
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=carried)
    model.check_processor(processor)
    if config.text_config is not None:
        processor.is_encoder_decoder = model.config.is_encoder_decoder  # older checkpoints do not say it there
    return Part(name_of(checkpoint), checkpoint, model, processor, quantization)


def _read_config(checkpoint: str) -> dict:
    try:
        return PreTrainedConfig.get_config_dict(checkpoint)[0]
    except (OSError, ValueError) as error:
        cause = str(error).strip().splitlines()[0]
        if os.path.isdir(checkpoint):
            raise ValueError(f"{checkpoint} cannot be loaded: {cause} Name a folder of a blip2x checkpoint.") from error
        # transformers speaks of the network alone, and a misspelt folder is the likelier cause.
        raise ValueError(
            f"There is no folder {checkpoint} here, and it was not found on the hub: {cause} Name a folder or hub id with a "
            "blip2x checkpoint; a private one needs `hf auth login`, or HF_TOKEN."
        ) from error


def _check(config: dict, checkpoint: str, carried: bool) -> None:
    """Raises ValueError where no blip2x checkpoint can be made of it here."""
    kind = config.get("model_type")
    if kind is None:
        raise ValueError(
            f"{checkpoint} has no config.json that names a model. Name a folder or hub id of a blip2x checkpoint."
        )
    if kind in CONVERTIBLE:
        raise ValueError(
            f"{checkpoint} is a {kind} checkpoint, not blip2x. Convert it first: "
            f"python -m modeling_blip2x.convert {checkpoint} FOLDER"
        )
    if kind != "blip2x":
        raise ValueError(
            f"{checkpoint} is a {kind} checkpoint, no BLIP-2 model. Name a folder or hub id with a blip2x checkpoint, such as "
            "stage1 or stage2 of a quickstart output."
        )
    if carried and "auto_map" not in config:
        raise ValueError(
            f"{checkpoint} does not carry its code, and the package blip2x is not installed here. Save it anew with "
            "modeling_blip2x.saving_code_blip2x.save_with_code where it is, or name the package in requirements.txt."
        )


def _device(name: str) -> str:
    """The device, once a tensor has been there: "auto" is a GPU where there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        cause = str(error).strip().splitlines()[0]
        raise ValueError(
            f"The device {name} is not available here ({cause}). Choose auto, cpu, cuda, cuda:1 or mps, as this machine has."
        ) from error
    return name


def name_of(checkpoint: str) -> str:
    """What visitors read: a hub id as it is, of a folder the last two names, never where it lies on the machine."""
    if not os.path.isdir(checkpoint):
        return checkpoint
    return "/".join(Path(checkpoint).resolve().parts[-2:])
