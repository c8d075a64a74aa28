"""Activation checkpointing that reaches frozen models, whose layers keep more activations than all that is trained.

transformers recomputes layers in training mode alone. A frozen language model stays in eval mode, so that its dropout is
off, and would keep every activation of the way from the loss back to the soft prompt.
"""

from functools import partial

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

# What a layer would write to twice, by its names in different models. Nobody reads it in training.
CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")


def recompute_in_eval_mode(part: nn.Module) -> None:
    """Let the layers of `part` obey `activation_checkpointing_enable` in eval mode too."""
    for layer in part.modules():
        if isinstance(layer, GradientCheckpointingLayer) and "forward" not in vars(layer):
            layer.forward = partial(forward_or_recompute, layer)


def as_transformers_does(part: nn.Module) -> None:
    """Undo `recompute_in_eval_mode`."""
    for layer in part.modules():
        if getattr(vars(layer).get("forward"), "func", None) is forward_or_recompute:
            del layer.forward


def forward_or_recompute(layer: GradientCheckpointingLayer, *args, **kwargs) -> object:
    """The forward of a layer, of which a backward in eval mode keeps the inputs alone where the layer is to recompute."""
    forward = partial(type(layer).forward, layer)  # in training mode transformers recomputes it itself
    if layer.training or not layer.gradient_checkpointing or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if not getattr(
        layer, "_can_checkpoint_with_cache", False
    ):  # such a layer reads what others write, and writes nothing
        kwargs |= {name: None for name in CACHES if name in kwargs}
    if "use_cache" in kwargs:
        kwargs["use_cache"] = False
    return layer._gradient_checkpointing_func(partial(forward, **kwargs), *args)
