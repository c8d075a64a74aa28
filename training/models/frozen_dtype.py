"""The dtype in which frozen parts are held: tower and language model where nothing of them is trained.

Under autocast a frozen float32 weight is cast anew at every forward, and its copy is kept until the backward. Held in
bfloat16 it is half as large and is not copied; what is trained, and the losses, stay in float32.
"""

import torch

from modeling_blip2x.modeling_blip2x import Blip2xPreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def hold_frozen(model: Blip2xPreTrainedModel, dtype: str | None, bf16: bool, features_cached: bool) -> None:
    """Cast the frozen parts to `dtype`; None: to bfloat16 under bf16 autocast, and otherwise leaves them as they are.

    features_cached: the tower does not run, and is left alone: it gains nothing here, and would lose digits in what is saved.
    """
    wanted = DTYPES[dtype] if dtype else torch.bfloat16 if bf16 else None
    if wanted is None:
        return
    for part in model.frozen_candidates():
        runs = part is not model.shared_model.vision_model or not features_cached
        if runs and is_frozen(part):
            cast(part, wanted)


def is_frozen(part: torch.nn.Module) -> bool:
    """Whether nothing of it is trained, but an adapter."""
    return not any(p.requires_grad and "lora_" not in name for name, p in part.named_parameters())


def cast(part: torch.nn.Module, dtype: torch.dtype) -> None:
    """As `from_pretrained(dtype=...)` would give it: all but an adapter, buffers that are computed, such as rotary
    frequencies, and what a family keeps in float32."""
    if getattr(part, "hf_quantizer", None) is not None:
        return
    kept = list(getattr(part, "_keep_in_fp32_modules_strict", None) or [])
    if dtype == torch.float16:
        kept += getattr(part, "_keep_in_fp32_modules", None) or []
    for name, tensor in part.state_dict(keep_vars=True).items():
        stays = tensor.requires_grad or not set(name.split(".")).isdisjoint(kept)
        if tensor.is_floating_point() and not stays:
            tensor.data = tensor.data.to(dtype)


def refuse_unscaled_float16(model: torch.nn.Module, bf16: bool, fp16: bool) -> None:
    """Raise ValueError for a float16 language model whose gradients nothing scales.

    They pass through it to the Q-Former, and most are below the smallest number of float16.
    """
    language_model = getattr(model, "language_model", None)
    if language_model is None or bf16 or fp16:
        return
    if any(parameter.dtype == torch.float16 for parameter in language_model.parameters()):
        raise ValueError(
            "The language model is in float16, and nothing scales the loss: the gradients that pass through it would "
            "become 0. Pass --bf16 true, --fp16 true, or --frozen_dtype float32."
        )
