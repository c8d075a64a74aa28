"""Reads tests/fixtures/golden: tiny models whose outputs the official implementation computed (see its README)."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling_blip2x import Blip2xConfig, Blip2xForConditionalGeneration, Blip2xForPreTraining
from modeling_blip2x.convert_from_blip2x import map_lavis_state_dict

FOLDER = Path(__file__).parent / "fixtures" / "golden"


class Golden:
    """One golden folder: config, expected scalars, and its tensors by kind."""

    def __init__(self, name: str):
        text = json.loads((FOLDER / name / "golden.json").read_text())
        self.config, self.expected = text["config"], text.get("expected", {})
        tensors = load_file(FOLDER / name / "golden.safetensors")
        self.official = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        self.inputs = {k.removeprefix("input."): v for k, v in tensors.items() if k.startswith("input.")}
        self.outputs = {k.removeprefix("output."): v for k, v in tensors.items() if k.startswith("output.")}


def vision_config(golden: Golden) -> dict:
    return {"model_type": "blip_2_vision_model", **golden.config["vision"]}


def stage1_config(golden: Golden) -> Blip2xConfig:
    config = golden.config
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
             "vocab_size", "bos_token_id", "pad_token_id", "cross_attention_frequency")  # fmt: skip
    return Blip2xConfig(
        vision_config=vision_config(golden),
        qformer_config={name: config[name] for name in names},
        num_query_tokens=config["num_query_tokens"],
        image_text_hidden_size=config["image_text_hidden_size"],
        vision_layer_norm_eps=1e-5,
    )


def stage1_model(golden: Golden, official: dict[str, torch.Tensor] | None = None) -> Blip2xForPreTraining:
    state = map_lavis_state_dict(official or golden.official)
    return load(Blip2xForPreTraining, stage1_config(golden), state)


def stage2_config(golden: Golden) -> Blip2xConfig:
    config = golden.config
    text = {name: value for name, value in config["text"].items() if name != "lm_head"}
    return Blip2xConfig(
        vision_config=vision_config(golden),
        qformer_config={**config["qformer"], "use_qformer_text_input": False},
        text_config=text,
        num_query_tokens=config["num_query_tokens"],
        image_token_index=text["vocab_size"],
        vision_layer_norm_eps=1e-5,
    )


def stage2_model(golden: Golden, official: dict[str, torch.Tensor] | None = None) -> Blip2xForConditionalGeneration:
    state = map_lavis_state_dict(official or golden.official)
    return load(Blip2xForConditionalGeneration, stage2_config(golden), state)


def load(model_class: type, config: Blip2xConfig, state: dict[str, torch.Tensor]):
    """Through from_pretrained, which leaves an untied lm_head alone; and nothing may be missing or left over."""
    state = {name: tensor.clone() for name, tensor in state.items()}  # from_pretrained takes the tensors themselves
    model, report = model_class.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    assert not report["unexpected_keys"], report["unexpected_keys"]
    assert not report["missing_keys"], report["missing_keys"]
    return model.eval()
