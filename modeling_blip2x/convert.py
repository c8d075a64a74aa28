"""Checkpoints of other implementations: the official BLIP-2 (LAVIS) names turned into ours."""

import torch

# Official name (or its beginning) -> ours. Within a Q-Former layer `_QFORMER_LAYER` goes on.
_PREFIXES = {
    "ln_vision.": "model.ln_vision.",
    "Qformer.bert.embeddings.LayerNorm.": "model.qformer.layernorm.",
    "Qformer.bert.embeddings.": "model.qformer.embeddings.",
    "Qformer.cls.predictions.transform.dense.": "itg_head.dense.",
    "Qformer.cls.predictions.transform.LayerNorm.": "itg_head.layernorm.",
    "vision_proj.": "vision_projection.",
    "text_proj.": "text_projection.",
    "itm_head.": "itm_head.",
    "opt_proj.": "language_projection.",
    "t5_proj.": "language_projection.",
    "opt_model.": "language_model.",
    "t5_model.": "language_model.",
    "visual_encoder.patch_embed.proj.": "model.vision_model.embeddings.patch_embedding.",
}
_EXACT = {
    "Qformer.cls.predictions.bias": "itg_head.bias",
    "visual_encoder.cls_token": "model.vision_model.embeddings.class_embedding",
    "visual_encoder.pos_embed": "model.vision_model.embeddings.position_embedding",
}
_QFORMER_LAYER = {
    "attention.self.": "attention.",
    "attention.output.dense.": "attention.dense.",
    "attention.output.LayerNorm.": "attention.layernorm.",
    "crossattention.self.": "crossattention.",
    "crossattention.output.dense.": "crossattention.dense.",
    "crossattention.output.LayerNorm.": "crossattention.layernorm.",
    "intermediate.dense.": "text_feed_forward.up.",
    "output.dense.": "text_feed_forward.down.",
    "output.LayerNorm.": "text_feed_forward.layernorm.",
    "intermediate_query.dense.": "query_feed_forward.up.",
    "output_query.dense.": "query_feed_forward.down.",
    "output_query.LayerNorm.": "query_feed_forward.layernorm.",
}
_VISION_LAYER = {
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "attn.qkv.weight": "self_attn.qkv.weight",
    "attn.proj.": "self_attn.projection.",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
}


def map_lavis_state_dict(official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of the official BLIP-2 (stage 1, stage 2 with OPT or T5) under our names.

    Raises:
        ValueError: names without a counterpart, all of them listed, or copies that are not equal to their original.
    """
    ours: dict[str, torch.Tensor] = {}
    unknown = []
    for name, tensor in official.items():
        if name.endswith("position_ids") or name.endswith("attn.v_bias"):
            continue  # a counter, and the second half of q_bias below
        if name == "query_tokens":
            ours["model.query_tokens.weight"] = tensor[0]
        elif name == "temp":
            ours["temperature"] = tensor.reshape(1)
        elif name in ("Qformer.cls.predictions.decoder.weight", "Qformer.cls.predictions.decoder.bias"):
            original = name.replace(".decoder.bias", ".bias")
            if name.endswith("weight"):
                original = "Qformer.bert.embeddings.word_embeddings.weight"
            if not torch.equal(tensor, official[original]):
                raise ValueError(
                    f"'{name}' differs from '{original}', of which it is a copy in the official model. The file is not a "
                    "BLIP-2 checkpoint, or was changed."
                )
        elif name.endswith("attn.q_bias"):
            layer = name.removeprefix("visual_encoder.blocks.").removesuffix(".attn.q_bias")
            v_bias = official[name.replace("q_bias", "v_bias")]
            ours[f"model.vision_model.encoder.layers.{layer}.self_attn.qkv.bias"] = torch.cat(
                [tensor, torch.zeros_like(tensor), v_bias]  # the keys have no bias
            )
        elif (mapped := _rename(name)) is not None:
            ours[mapped] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors of the checkpoint have no counterpart: {', '.join(sorted(unknown))}. It is not an "
            "official BLIP-2 checkpoint of stage 1 or stage 2."
        )
    return ours


def _rename(name: str) -> str | None:
    if name in _EXACT:
        return _EXACT[name]
    for theirs, ours, table in (
        ("Qformer.bert.encoder.layer.", "model.qformer.layers.", _QFORMER_LAYER),
        ("visual_encoder.blocks.", "model.vision_model.encoder.layers.", _VISION_LAYER),
    ):
        if name.startswith(theirs):
            number, rest = name.removeprefix(theirs).split(".", 1)
            return _replace_start(rest, table, f"{ours}{number}.")
    return _replace_start(name, _PREFIXES, "")


def _replace_start(name: str, table: dict[str, str], prefix: str) -> str | None:
    for theirs, ours in table.items():
        if name.startswith(theirs):
            return prefix + ours + name.removeprefix(theirs)
    return None
