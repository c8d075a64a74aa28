"""Checkpoints of either stage, loaded or refused."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoProcessor,
    PreTrainedConfig,
)

from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xForPreTraining, Blip2xProcessor


def read_stage1_config(folder: str) -> PreTrainedConfig:
    """The config of a stage-1 checkpoint; raises ValueError if `folder` holds anything else."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "blip2x" or config.text_config is not None:
        kind = "a stage-2 model" if config.model_type == "blip2x" else f"a {config.model_type} model"
        raise ValueError(f"--init_from {folder} holds {kind}. Give the output folder of pretrain_stage1.py.")
    return config


def load_model(
    folder: str, device: str
) -> tuple[Blip2xForPreTraining | Blip2xForConditionalGeneration, Blip2xProcessor]:
    """A stage-1 or stage-2 checkpoint and its processor; ValueError for anything else."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "blip2x":
        raise ValueError(f"{folder} holds a {config.model_type} model. Give the output folder of a stage 1 or 2.")
    kind = AutoModelForPreTraining if config.text_config is None else AutoModelForImageTextToText
    return kind.from_pretrained(folder).eval().to(device), AutoProcessor.from_pretrained(folder)


def is_stage1(model: torch.nn.Module) -> bool:
    return model.config.text_config is None
