"""Any transformers vision model as a tower: its output turned into features (B, N, D).

BLIP-2's own EVA tower is `Blip2VisionModel`, which AutoModel does not know. Its final LayerNorm is not part of the
frozen tower: it is the trained `ln_vision` of the model around it, so it is replaced by an identity here.
"""

import inspect

import torch
from torch import nn
from transformers import AutoModel, Blip2VisionModel
from transformers.configuration_utils import PreTrainedConfig


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


def vision_features(
    tower: nn.Module, pixel_values: torch.Tensor, feature_layer: int, interpolate_pos_encoding: bool = False
) -> tuple[torch.Tensor, object]:
    """Features (B, N, D) of pixel_values (B, 3, height, width), and the tower's own output.

    A feature map (B, D, h, w) becomes (B, h * w, D). Raises ValueError where the tower refuses the image size.
    """
    options = {}
    if feature_layer != -1:
        options["output_hidden_states"] = True
    if interpolate_pos_encoding:
        if "interpolate_pos_encoding" not in inspect.signature(tower.forward).parameters:
            raise ValueError(
                f"The vision tower {type(tower).__name__} cannot interpolate its position embeddings. Resize the image "
                "to the size of its config, or use a tower that takes interpolate_pos_encoding."
            )
        options["interpolate_pos_encoding"] = True
    output = tower(pixel_values=pixel_values, return_dict=True, **options)
    features = output.last_hidden_state if feature_layer == -1 else output.hidden_states[feature_layer]
    if features.ndim == 4:
        features = features.flatten(2).transpose(1, 2)
    return features, output
