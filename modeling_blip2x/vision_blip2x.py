"""Any transformers vision model as a tower: its output turned into features (B, N, D).

BLIP-2's own EVA tower is `Blip2VisionModel`, which AutoModel does not know. Its final LayerNorm is not part of the
frozen tower: it is the trained `ln_vision` of the model around it, so it is replaced by an identity here.

The width of a tower's features is read off its config in configuration_blip2x.py (`vision_hidden_size`), since a config
must know it before there is a tower.
"""

import copy
import inspect
from functools import partial
from types import MethodType

import torch
from torch import nn
from transformers import AutoModel, Blip2VisionModel, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.output_capturing import _hook_installation_lock

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
        return without_final_norm(Blip2VisionModel(config))
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


def with_eager_attention(module: nn.Module) -> nn.Module:
    """A view of `module` whose attention is eager: sdpa has no weights to return, and transformers returns empty tuples.

    The view has modules and configs of its own, and everything else is shared: parameters (gradients reach them), buffers,
    adapters, packed weights. `module` itself is only read, so that other threads may be calling it. Costs about 30
    microseconds for each of its submodules; make a view for a call, as it does not see what is attached to `module` later.
    """
    views: dict[int, object] = {id(part): object.__new__(type(part)) for part in module.modules()}
    # transformers records weights by hooks, and a mark says that they are there: the view gets both, or none.
    with _hook_installation_lock:
        for part in module.modules():
            state = part.__getstate__()  # without what torch.compile made of the part
            for name, value in state.items():
                # A method or partial among the attributes is a forward that accelerate, say, has put before the class's.
                if isinstance(value, (PreTrainedConfig, MethodType, partial)):
                    state[name] = copy.deepcopy(value, views)
                elif isinstance(value, dict) and not any(isinstance(item, torch.Tensor) for item in value.values()):
                    state[name] = value.copy()  # of hooks, or of submodules
                    state[name].update((key, views[id(item)]) for key, item in value.items() if id(item) in views)
            views[id(part)].__setstate__(state)
    view = views[id(module)]
    for part in view.modules():
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation("eager")
    return view


def _unwrapped(tower: nn.Module) -> nn.Module:
    """The tower inside, where PEFT has wrapped it whole: the wrappers' forward takes any argument."""
    tower = tower.get_base_model() if hasattr(tower, "get_base_model") else tower
    return getattr(tower, "original_module", tower)  # of modules_to_save


def vision_features(
    tower: nn.Module,
    pixel_values: torch.Tensor,
    feature_layer: int,
    interpolate_pos_encoding: bool = False,
    output_attentions: bool = False,
    output_hidden_states: bool | list[int] = False,
) -> BaseModelOutput:
    """Features (B, N, D) of pixel_values (B, 3, height, width) in `last_hidden_state`, and what else is asked for.

    A feature map (B, D, h, w) becomes (B, h * w, D). Raises ValueError for a feature_layer that the tower does not have.
    """
    accepted = inspect.signature(_unwrapped(tower).forward).parameters
    options = {"output_hidden_states": True} if output_hidden_states or feature_layer != -1 else {}
    if output_attentions and ("output_attentions" in accepted or "kwargs" in accepted):
        options["output_attentions"] = True
    if interpolate_pos_encoding and "interpolate_pos_encoding" in accepted:
        options["interpolate_pos_encoding"] = True  # towers without this argument (DINOv2, CNNs) take any size
    model = with_eager_attention(tower) if output_attentions else tower
    output = model(pixel_values, return_dict=True, **options)
    if feature_layer != -1 and not -len(output.hidden_states) <= feature_layer < len(output.hidden_states):
        count = len(output.hidden_states)
        raise ValueError(
            f"vision_feature_layer is {feature_layer}, but this {tower.config.model_type} tower has {count} hidden states: "
            f"choose from {-count} to {count - 1}."
        )
    features = output.last_hidden_state if feature_layer == -1 else output.hidden_states[feature_layer]
    if features.ndim == 4:  # a CNN's map: its places, row by row, are the positions
        features = features.flatten(2).transpose(1, 2)
    return BaseModelOutput(
        last_hidden_state=features,
        hidden_states=chosen_hidden_states(output.hidden_states, output_hidden_states),
        attentions=getattr(output, "attentions", None) if output_attentions else None,
    )


def thinned(features: torch.Tensor, position_dropout: float, feature_dropout: float) -> torch.Tensor:
    """Features (B, N, D) of images as training may show them, (B, N', D): without a random share of each image's positions,
    and with zeros for a random share of its D features, the others scaled up as dropout does.

    At least one position is left.
    """
    batch, positions, width = features.shape
    if position_dropout:
        left = max(1, round(positions * (1 - position_dropout)))
        kept = torch.rand(batch, positions, device=features.device).argsort(dim=1)[:, :left].sort(dim=1).values
        features = features.gather(1, kept[:, :, None].expand(-1, -1, width))
    if feature_dropout:
        kept = torch.rand(batch, 1, width, device=features.device) >= feature_dropout
        features = features * (kept / (1 - feature_dropout)).to(features.dtype)
    return features
