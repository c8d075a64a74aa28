"""Checkpoints of either stage, loaded or refused."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoProcessor,
    PreTrainedConfig,
)

from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xForPreTraining, Blip2xProcessor


def checkpoints_below(folder: str) -> str:
    """A sentence that names the checkpoints in a folder which is none itself, such as the root of a quickstart; or ""."""
    path = Path(folder)
    if not path.is_dir() or (path / "config.json").exists():
        return ""
    # A run's own checkpoint-N folders hold no config.json; those of a quickstart hold towers and language models too.
    below = [str(inside.parent) for inside in sorted(path.glob("*/config.json")) if '"blip2x"' in inside.read_text()]
    return f" It is no checkpoint, but has some below it: {', '.join(below)}. Give one of them." if below else ""


def read_stage1_config(folder: str) -> PreTrainedConfig:
    """The config of a stage-1 checkpoint; raises ValueError if `folder` holds anything else."""
    if below := checkpoints_below(folder):
        raise ValueError(f"--init_from {folder} cannot be loaded.{below}")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "blip2x" or config.text_config is not None:
        kind = "a stage-2 model" if config.model_type == "blip2x" else f"a {config.model_type} model"
        raise ValueError(f"--init_from {folder} holds {kind}. Give the output folder of pretrain_stage1.py.")
    return config


def load_model(
    folder: str, device: str
) -> tuple[Blip2xForPreTraining | Blip2xForConditionalGeneration, Blip2xProcessor]:
    """A stage-1 or stage-2 checkpoint and its processor; ValueError for anything else."""
    if below := checkpoints_below(folder):
        raise ValueError(f"{folder} cannot be loaded.{below}")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "blip2x":
        raise ValueError(f"{folder} holds a {config.model_type} model. Give the output folder of a stage 1 or 2.")
    kind = AutoModelForPreTraining if config.text_config is None else AutoModelForImageTextToText
    return kind.from_pretrained(folder).eval().to(device), AutoProcessor.from_pretrained(folder)


def is_stage1(model: torch.nn.Module) -> bool:
    return model.config.text_config is None
