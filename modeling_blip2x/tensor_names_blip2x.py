"""Names of tensors in other implementations of BLIP-2, in both directions.

A table is a list of beginnings: theirs, ours. Q-Former and tower layers have a table of their own, for what follows the
layer's number. Where one of their tensors is not one of ours (biases of the tower's attention, copies of the embedding),
`convert.py` says what happens to it.
"""

from dataclasses import dataclass

_QFORMER = {
    # The first that fits counts, either way: the longer of our beginnings stand before the shorter.
    "attention.output.dense.": "attention.dense.",
    "attention.output.LayerNorm.": "attention.layernorm.",
    "attention.self.": "attention.",
    "crossattention.output.dense.": "crossattention.dense.",
    "crossattention.output.LayerNorm.": "crossattention.layernorm.",
    "crossattention.self.": "crossattention.",
    "intermediate.dense.": "text_feed_forward.up.",
    "output.dense.": "text_feed_forward.down.",
    "output.LayerNorm.": "text_feed_forward.layernorm.",
    "intermediate_query.dense.": "query_feed_forward.up.",
    "output_query.dense.": "query_feed_forward.down.",
    "output_query.LayerNorm.": "query_feed_forward.layernorm.",
}


@dataclass(frozen=True)
class NameTable:
    """Their names and ours: `start` for whole names or their beginnings; `layers` for what follows a layer's number."""

    start: dict[str, str]
    layers: dict[tuple[str, str], dict[str, str]]

    def ours(self, name: str) -> str | None:
        """Our name of their tensor; None if it has none."""
        return self._rename(name, theirs=0)

    def theirs(self, name: str) -> str | None:
        """Their name of our tensor; None if they have none."""
        return self._rename(name, theirs=1)

    def _rename(self, name: str, theirs: int) -> str | None:
        for pair, table in self.layers.items():
            if name.startswith(pair[theirs]):
                number, _, rest = name.removeprefix(pair[theirs]).partition(".")
                renamed = _replace_start(rest, list(table.items()), theirs)
                return None if renamed is None else f"{pair[1 - theirs]}{number}.{renamed}"
        return _replace_start(name, list(self.start.items()), theirs)


def _replace_start(name: str, pairs: list[tuple[str, str]], side: int) -> str | None:
    for pair in pairs:
        if name == pair[side] or (pair[side].endswith(".") and name.startswith(pair[side])):
            return pair[1 - side] + name.removeprefix(pair[side])
    return None


def lavis_names(language_model: str | None) -> NameTable:
    """Names of the official implementation. language_model: opt, t5 or llm, as its attribute begins; None for stage 1."""
    start = {
        "query_tokens": "model.query_tokens.weight",
        "temp": "temperature",
        "ln_vision.": "model.ln_vision.",
        "Qformer.bert.embeddings.LayerNorm.": "model.qformer.layernorm.",
        "Qformer.bert.embeddings.": "model.qformer.embeddings.",
        "Qformer.cls.predictions.transform.dense.": "itg_head.dense.",
        "Qformer.cls.predictions.transform.LayerNorm.": "itg_head.layernorm.",
        "Qformer.cls.predictions.bias": "itg_head.bias",
        "vision_proj.": "vision_projection.",
        "text_proj.": "text_projection.",
        "itm_head.": "itm_head.",
        "visual_encoder.cls_token": "model.vision_model.embeddings.class_embedding",
        "visual_encoder.pos_embed": "model.vision_model.embeddings.position_embedding",
        "visual_encoder.patch_embed.proj.": "model.vision_model.embeddings.patch_embedding.",
    }
    if language_model is not None:
        start |= {f"{language_model}_proj.": "language_projection.", f"{language_model}_model.": "language_model."}
    tower = {
        "norm1.": "layer_norm1.",
        "norm2.": "layer_norm2.",
        "attn.qkv.": "self_attn.qkv.",
        "attn.proj.": "self_attn.projection.",
        "mlp.fc1.": "mlp.fc1.",
        "mlp.fc2.": "mlp.fc2.",
    }
    return NameTable(
        start,
        {
            ("Qformer.bert.encoder.layer.", "model.qformer.layers."): _QFORMER,
            ("visual_encoder.blocks.", "model.vision_model.encoder.layers."): tower,
        },
    )


def mmpretrain_names(retrieval: bool) -> NameTable:
    """Names of mmpretrain. retrieval: its `vision_neck` is the ITC projection, elsewhere that into the language model."""
    start = {
        "query_tokens": "model.query_tokens.weight",
        "temp": "temperature",
        "ln_vision_backbone.": "model.ln_vision.",
        "multimodal_backbone.bert.embeddings.LayerNorm.": "model.qformer.layernorm.",
        "multimodal_backbone.bert.embeddings.": "model.qformer.embeddings.",
        "multimodal_backbone.cls.predictions.transform.dense.": "itg_head.dense.",
        "multimodal_backbone.cls.predictions.transform.LayerNorm.": "itg_head.layernorm.",
        "multimodal_backbone.cls.predictions.bias": "itg_head.bias",
        "vision_neck.fc.": "vision_projection." if retrieval else "language_projection.",
        "text_neck.fc.": "text_projection.",
        "multimodal_head.fc.": "itm_head.",
        "vision_backbone.cls_token": "model.vision_model.embeddings.class_embedding",
        "vision_backbone.pos_embed": "model.vision_model.embeddings.position_embedding",
        "vision_backbone.patch_embed.projection.": "model.vision_model.embeddings.patch_embedding.",
    }
    tower = {
        "ln1.": "layer_norm1.",
        "ln2.": "layer_norm2.",
        "attn.qkv.": "self_attn.qkv.",
        "attn.proj.": "self_attn.projection.",
        "ffn.layers.0.0.": "mlp.fc1.",
        "ffn.layers.1.": "mlp.fc2.",
    }
    return NameTable(
        start,
        {
            ("multimodal_backbone.bert.encoder.layer.", "model.qformer.layers."): _QFORMER,
            ("vision_backbone.layers.", "model.vision_model.encoder.layers."): tower,
        },
    )


def transformers_names(instruct: bool) -> NameTable:
    """Names of transformers' BLIP-2 classes; instruct: of InstructBLIP, whose Q-Former holds the text embeddings."""
    if instruct:
        text = {
            "qformer.embeddings.layernorm.": "model.qformer.layernorm.",
            "qformer.embeddings.": "model.qformer.embeddings.",
        }
    else:
        text = {"qformer.layernorm.": "model.qformer.layernorm.", "embeddings.": "model.qformer.embeddings."}
    start = {
        "query_tokens": "model.query_tokens.weight",
        "vision_model.post_layernorm.": "model.ln_vision.",
        "vision_model.": "model.vision_model.",
        **text,
        "vision_projection.": "vision_projection.",
        "text_projection.": "text_projection.",
        "itm_head.": "itm_head.",
        "language_projection.": "language_projection.",
        "language_model.": "language_model.",
    }
    layer = {theirs.replace(".self.", ".attention."): ours for theirs, ours in _QFORMER.items()}
    return NameTable(start, {("qformer.encoder.layer.", "model.qformer.layers."): layer})
