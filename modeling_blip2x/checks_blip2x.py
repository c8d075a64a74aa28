"""Tensors that no model can read, refused in words: an empty batch, pixels that are no numbers, a text without end.

Left to themselves they end in errors of a reshape or a look-up far below, or in fluent words about a picture of NaN. A
compiled or exported graph has no such checks: they depend on data.
"""

import torch
from transformers import PreTrainedConfig


def check_images(name: str, values: torch.Tensor, training: bool) -> None:
    """pixel_values or vision_embeds (B, ...), called `name`.

    While training NaN is left to the loss: one process that raised would leave the others waiting for it.

    Raises:
        ValueError: no image, or a value that is NaN or infinite, with the rows that have one.
    """
    if torch.compiler.is_compiling() or values.is_meta:
        return
    if values.shape[0] == 0:
        raise ValueError(f"{name} has no image: its shape is {tuple(values.shape)}. Pass at least one.")
    if training or torch.isfinite(values).all():
        return
    rows = [row for row, value in enumerate(values) if not torch.isfinite(value).all()]
    raise ValueError(
        f"{name} has NaN or infinite values in {'row' if len(rows) == 1 else 'rows'} {', '.join(map(str, rows))}. Look at "
        "what made them; a tower that overflows in float16 needs bfloat16 or float32."
    )


def check_text(name: str, ids: torch.Tensor) -> None:
    """Ids (B, L) or embeddings (B, L, width), called `name`. Raises ValueError where there is no text, or no token."""
    if not torch.compiler.is_compiling() and 0 in ids.shape[:2]:
        raise ValueError(f"{name} is empty: its shape is {tuple(ids.shape)}. Pass at least one text of one token.")


def check_prompt(config: PreTrainedConfig, embeds: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """The prompt (B, L, width) of a language model with this config, and its mask (B, L).

    Raises:
        ValueError: an empty one, or one with more tokens than the language model has positions.
    """
    check_text("The prompt", embeds)
    longest = getattr(config, "max_position_embeddings", None)
    if torch.compiler.is_compiling() or embeds.is_meta or longest is None or embeds.shape[1] <= longest:
        return
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "dynamic":  # whose positions grow
        return
    # Padding takes no position.
    tokens = embeds.shape[1] if attention_mask is None else int(attention_mask.sum(dim=-1).max())
    if tokens > longest:
        raise ValueError(
            f"The prompt has {tokens} tokens, those of images included, but the language model reads {longest} "
            "(max_position_embeddings). Shorten the text, or cut it: processor(..., truncation=True, max_length=...)."
        )
