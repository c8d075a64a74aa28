"""Checkpoints as transformers, LAVIS and mmpretrain write them."""

import torch
from safetensors.torch import save_file

from tests.helpers.golden import Golden, vision_config
from tests.helpers.tiny import LANGUAGE_MODELS, QUERIES, SIZE

SHAPES = {
    "small": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48},
    "like ViT-g": {"hidden_size": 88, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 384},
}
QFORMER = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 61,
}


def their_config(kind, language_model, shape, **qformer):
    """A config of transformers' BLIP-2 or InstructBLIP."""
    vision = {**SHAPES[shape], "image_size": SIZE, "patch_size": 14}
    qformer = {**QFORMER, "encoder_hidden_size": vision["hidden_size"], **qformer}
    text = LANGUAGE_MODELS[language_model].to_dict()
    text |= {"decoder_start_token_id": 0} if language_model == "t5" else {}
    return kind(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=QUERIES, image_token_index=69
    )


def golden_config(name):
    """What a user would write into --config: the fields that tensors do not tell."""
    config = Golden(name).config
    qformer = config.get("qformer", config)
    fields = {
        "vision_config": vision_config(Golden(name)),
        "qformer_config": {"num_attention_heads": qformer["num_attention_heads"]},
    }
    if "text" in config:
        fields["text_config"] = {k: v for k, v in config["text"].items() if k != "lm_head"}
    return fields


def write_official(name, path):
    official = Golden(name).official
    if path.suffix == ".pth":
        torch.save({"model": official, "optimizer": {"state": {}}, "epoch": 3}, path)
    else:
        save_file(official, path)
