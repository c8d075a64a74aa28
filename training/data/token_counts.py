"""How many tokens of a batch are supervised: what the loss on its texts is a mean over."""

import torch

from .collators import IGNORE


def text_tokens(batch: dict) -> torch.Tensor:
    """Tokens that ITG predicts in a batch of stage 1: all but [CLS]."""
    return batch["attention_mask"][:, 1:].sum()


def label_tokens(batch: dict, is_encoder_decoder: bool) -> torch.Tensor:
    """Tokens that a language model predicts; a decoder-only one predicts from the second on."""
    labels = batch["labels"] if is_encoder_decoder else batch["labels"][:, 1:]
    return (labels != IGNORE).sum()
