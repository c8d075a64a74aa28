"""Checkpoints of either stage, loaded or refused."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
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
    processor = AutoProcessor.from_pretrained(folder)
    if config.text_config is not None:
        processor.is_encoder_decoder = config.is_encoder_decoder  # older checkpoints do not say it there
    return kind.from_pretrained(folder).eval().to(device), processor


def load_language_tokenizer(name: str, end_token: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model, with `end_token` as what ends a text, if that is given.

    Raises ValueError where nothing ends a text, or where `end_token` is no token of the vocabulary.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    if end_token is not None:
        if end_token not in tokenizer.get_vocab():
            raise ValueError(f"--end_token {end_token!r} is no token of the tokenizer of {name}. Name one that is.")
        tokenizer.eos_token = end_token
    if tokenizer.eos_token is None and tokenizer.sep_token is None:
        end = AutoConfig.from_pretrained(name).eos_token_id
        known = isinstance(end, int) and end < len(tokenizer)
        example = tokenizer.convert_ids_to_tokens(end) if known else "</s>"
        raise ValueError(
            f"The tokenizer of {name} names no token that ends a text (eos_token or sep_token), so no text could be taught "
            f"to end. Pass --end_token with the one that the language model was trained with, such as {example!r}."
        )
    return tokenizer


def agree_on_texts(model: Blip2xForConditionalGeneration, processor: Blip2xProcessor) -> None:
    """Let `generate` begin and end where the processor lays texts out, as training does; kept in the checkpoint."""
    processor.is_encoder_decoder = model.config.is_encoder_decoder
    layout, generation = processor.text_layout, model.generation_config
    model.config.empty_prompt = [*layout.before, *layout.after]
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    if layout.end not in ends:  # a model with another family's tokenizer; OPT's line break stays an end
        rows = model.get_input_embeddings().weight.shape[0]
        generation.eos_token_id = [layout.end, *[one for one in ends if one is not None and one < rows]]
        generation.pad_token_id = processor.tokenizer.pad_token_id
    if model.config.is_encoder_decoder:
        generation.forced_bos_token_id = layout.opening[0] if layout.opening else None
        if layout.start is not None:
            generation.decoder_start_token_id = model.config.text_config.decoder_start_token_id = layout.start


def is_stage1(model: torch.nn.Module) -> bool:
    return model.config.text_config is None
