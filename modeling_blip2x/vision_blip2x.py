"""Any transformers vision model as a tower: its output turned into features (B, N, D).

BLIP-2's own EVA tower is `Blip2VisionModel`, which AutoModel does not know. Its final LayerNorm is not part of the
frozen tower: it is the trained `ln_vision` of the model around it, so it is replaced by an identity here.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoModel, Blip2VisionModel, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from .outputs_blip2x import chosen_hidden_states

# What a tower has besides the path to its features: pooling heads and the mask of masked image modelling.
PARTS_WITHOUT_GRADIENT = {
    "clip_vision_model": ("post_layernorm",),
    "siglip_vision_model": ("head",),
    "vit": ("pooler", "embeddings.mask_token"),
    "dinov2": ("embeddings.mask_token",),
}


def build_vision_tower(config: PreTrainedConfig) -> nn.Module:
    """Vision model of this config with random weights."""
    if config.model_type == "blip_2_vision_model":
        return without_final_norm(Blip2VisionModel._from_config(config))
    return AutoModel.from_config(config)


def without_final_norm(tower: nn.Module) -> nn.Module:
    """Take the final LayerNorm off a `Blip2VisionModel`; other towers are returned as they are."""
    if tower.config.model_type == "blip_2_vision_model":
        tower.post_layernorm = nn.Identity()
    return tower


def freeze_unused_parts(tower: nn.Module) -> nn.Module:
    """Freeze what the features do not depend on: a trainable parameter without gradient stops DDP and wastes state."""
    unused = PARTS_WITHOUT_GRADIENT.get(tower.config.model_type, ())
    for name, parameter in tower.named_parameters():
        if any(name == part or name.startswith(f"{part}.") for part in unused):
            parameter.requires_grad_(False)
    return tower


def parameters_of_features(tower: nn.Module, feature_layer: int) -> set[str]:
    """Names of the tower's parameters that its features depend on, asked of autograd on a copy without memory."""
    with torch.device("meta"):
        probe = build_vision_tower(tower.config).eval()
        size = getattr(tower.config, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        pixels = torch.zeros(1, getattr(tower.config, "num_channels", 3), height, width)
    names, parameters = zip(*probe.named_parameters())
    features = vision_features(probe, pixels, feature_layer).last_hidden_state
    gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    return {name for name, gradient in zip(names, gradients) if gradient is not None}


@contextmanager
def attention_weights_of(model: nn.Module, wanted: bool | None) -> Iterator[None]:
    """Eager attention within, where weights are wanted: sdpa computes none, and transformers would return empty tuples."""
    configs = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)] if wanted else []
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in zip(configs, before):
            config._attn_implementation = implementation


def vision_features(
    tower: nn.Module,
    pixel_values: torch.Tensor,
    feature_layer: int,
    interpolate_pos_encoding: bool = False,
    output_attentions: bool = False,
    output_hidden_states: bool | list[int] = False,
) -> BaseModelOutput:
    """Features (B, N, D) of pixel_values (B, 3, height, width) in `last_hidden_state`, and what else is asked for.

    A feature map (B, D, h, w) becomes (B, h * w, D). Raises ValueError where the tower refuses the image size.
    """
    accepted = inspect.signature(tower.forward).parameters
    options = {"output_hidden_states": True} if output_hidden_states or feature_layer != -1 else {}
    if output_attentions and ("output_attentions" in accepted or "kwargs" in accepted):
        options["output_attentions"] = True
    if interpolate_pos_encoding and "interpolate_pos_encoding" in accepted:
        options["interpolate_pos_encoding"] = True  # DINOv2 and CNNs take any size anyway
    with attention_weights_of(tower, output_attentions):
        output = tower(pixel_values=pixel_values, return_dict=True, **options)
    features = output.last_hidden_state if feature_layer == -1 else output.hidden_states[feature_layer]
    if features.ndim == 4:
        features = features.flatten(2).transpose(1, 2)
    return BaseModelOutput(
        last_hidden_state=features,
        hidden_states=chosen_hidden_states(output.hidden_states, output_hidden_states),
        attentions=getattr(output, "attentions", None) if output_attentions else None,
    )
