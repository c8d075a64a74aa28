"""Reads tests/fixtures/golden: tiny models whose outputs the official implementation computed (see its README)."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling_blip2x import Blip2xConfig, Blip2xForConditionalGeneration, Blip2xForPreTraining
from modeling_blip2x.convert_from_blip2x import language_model_of, rename, without_copies
from modeling_blip2x.tensor_names_blip2x import lavis_names
from modeling_blip2x.weight_files_blip2x import Weight

FOLDER = Path(__file__).parents[1] / "fixtures" / "golden"


def map_lavis_state_dict(official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of the official BLIP-2 (stage 1, or stage 2 with OPT, T5 or Vicuna) under our names.

    Raises ValueError for names without a counterpart, all of them listed, or copies that differ from their original.
    """
    found = {name: Weight.of(tensor) for name, tensor in official.items()}
    source = "the checkpoint"
    weights = rename(without_copies(found, "Qformer.", source), lavis_names(language_model_of(found)), source)
    return {name: weight.read() for name, weight in weights.items()}


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


def stage2_inputs(golden: Golden, model) -> dict[str, torch.Tensor]:
    """The official inputs with our placeholders before them, and labels."""
    ids, mask = golden.inputs["input_ids"], golden.inputs["attention_mask"]
    image = torch.full((len(ids), model.config.num_query_tokens), model.config.image_token_index)
    full, full_mask = torch.cat([image, ids], dim=1), torch.cat([torch.ones_like(image), mask], dim=1)
    if "labels" in golden.inputs:
        labels = golden.inputs["labels"].masked_fill(golden.inputs["labels"] == 0, -100)
    else:
        labels = torch.cat([torch.full_like(image, -100), ids.masked_fill(mask == 0, -100)], dim=1)
    inputs = {"pixel_values": golden.inputs["pixel_values"], "input_ids": full, "attention_mask": full_mask}
    return {**inputs, "labels": labels}


@torch.no_grad()
def stage1_outputs(golden: Golden, model) -> dict[str, torch.Tensor]:
    inputs = golden.inputs
    out = model(**inputs)
    images = model.get_image_features(inputs["pixel_values"]).pooler_output
    texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    return {
        "image_embeds": model.model.ln_vision(model.model.get_vision_embeds(inputs["pixel_values"])),
        "itm_logits": model.itm_logits(**inputs),
        "itc_sim": model.itc_scores(images, texts).diagonal()[:, None],
        **{name: out[name] for name in ("loss_itc", "loss_itm", "loss_itg", "loss")},
    }
