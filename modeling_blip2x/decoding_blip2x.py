"""From the ids that `generate` returns to the text that it wrote."""

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


def id_lists(ids) -> list[list[int]]:
    """Rows of ids as lists, from a tensor, an array, or a list of lists or of these; a single row becomes a batch."""
    rows = ids.tolist() if isinstance(ids, (torch.Tensor, np.ndarray)) else list(ids)
    rows = [row.tolist() if isinstance(row, (torch.Tensor, np.ndarray)) else row for row in rows]
    return [rows] if rows and isinstance(rows[0], int) else [list(row) for row in rows]


def without_prompts(rows: list[list[int]], prompts: list[list[int]]) -> list[list[int]]:
    """Rows of generated ids without the prompts they begin with, where they do: those of decoder-only models.

    Args:
        rows: one or more for each prompt, those of a prompt one after the other.

    Raises:
        ValueError: the rows are no multiple of the prompts.
    """
    if not prompts or len(rows) % len(prompts):
        raise ValueError(
            f"ids has {len(rows)} rows and input_ids {len(prompts)}. Pass what generate returned and the input_ids that it "
            "was given."
        )
    copies = len(rows) // len(prompts)
    prompts = [prompt for prompt in prompts for _ in range(copies)]
    if all(row[: len(prompt)] == prompt for row, prompt in zip(rows, prompts)):
        return [row[len(prompt) :] for row, prompt in zip(rows, prompts)]
    return rows


def decode_until(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], end: int | None) -> list[str]:
    """Text of rows of ids up to the end token, whatever they are padded with behind it; no special tokens."""
    rows = [row[: row.index(end)] if end in row else row for row in rows]
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
