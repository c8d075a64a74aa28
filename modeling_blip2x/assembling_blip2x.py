"""Models from parts: a vision tower, a BERT checkpoint or fresh Q-Former, a language model, and the hand-over of stage 1.

Weights are checked as they move: shapes must fit, and every tensor is taken or reported as dropped or new.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, Blip2VisionModel

from .configuration_blip2x import Blip2xConfig, Blip2xQFormerConfig
from .qformer_blip2x import QFormer
from .vision_blip2x import without_final_norm

NORMED = 4096  # words whose norms tell that of a vocabulary


@dataclass
class HandOver:
    """What became of the tensors of a stage-1 checkpoint in a generative model."""

    loaded: list[str]
    dropped: list[str]
    new: list[str]

    def __str__(self) -> str:
        def parts(names: list[str]) -> str:
            counts: dict[str, int] = {}
            for name in names:
                part = ".".join(name.removeprefix("model.").split(".")[: 2 if "feed_forward" in name else 1])
                counts[part] = counts.get(part, 0) + 1
            return ", ".join(f"{part} ({count})" for part, count in counts.items()) or "nothing"

        return (
            "Hand-over from stage 1 (tensors):\n"
            f"  loaded   {parts(self.loaded)}\n"
            f"  dropped  {parts(self.dropped)}\n"
            f"  new      {parts(self.new)}"
        )


def load_vision_model(vision_model: str | nn.Module) -> nn.Module:
    """A vision tower from an id, a folder or a loaded module. Of an image-text model (CLIP) only the tower is read."""
    if isinstance(vision_model, nn.Module):
        return without_final_norm(vision_model)
    config = AutoConfig.from_pretrained(vision_model)
    config = getattr(config, "vision_config", config)
    options = {"config": config, "output_loading_info": True}
    if config.model_type == "blip_2_vision_model":  # in a BLIP-2 checkpoint its names begin with vision_model.
        tower, report = Blip2VisionModel.from_pretrained(vision_model, key_mapping={r"^vision_model\.": ""}, **options)
    else:
        tower, report = AutoModel.from_pretrained(vision_model, **options)
    # transformers fills what a checkpoint lacks with random numbers. Only a pooling head, which is unused, may be missing.
    missing = [name for name in report["missing_keys"] if "pooler" not in name and "head" not in name]
    if missing:
        raise ValueError(
            f"'{vision_model}' has no weights for {len(missing)} tensors of a {type(tower).__name__}: "
            f"{', '.join(sorted(missing)[:5])}, ... Name a checkpoint that holds the whole vision tower."
        )
    return without_final_norm(tower)


def load_language_model(language_model: str | nn.Module) -> nn.Module:
    """A causal or encoder-decoder language model from an id, a folder or a loaded module."""
    if isinstance(language_model, nn.Module):
        return language_model
    config = AutoConfig.from_pretrained(language_model)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto_class.from_pretrained(language_model)


def check_tokenizer(config: Blip2xQFormerConfig, tokenizer: object) -> None:
    """Raise ValueError if token ids of `tokenizer` do not fit a Q-Former of this config."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens but the Q-Former's vocab_size is {config.vocab_size}. Use the "
            f"tokenizer it was made with, or set vocab_size={len(tokenizer)} for a new Q-Former."
        )
    if tokenizer.bos_token_id != config.bos_token_id:
        raise ValueError(
            f"The tokenizer's bos_token_id ([DEC]) is {tokenizer.bos_token_id} but the Q-Former's is "
            f"{config.bos_token_id}. Use the tokenizer of a Blip2xProcessor, and set bos_token_id to its [DEC]."
        )


def _qformer_config(qformer: str | Blip2xQFormerConfig | None, tokenizer: object | None) -> Blip2xQFormerConfig:
    """The config of the Q-Former to build; a BERT checkpoint's with one more row for [DEC]."""
    if isinstance(qformer, str):
        bert = AutoConfig.from_pretrained(qformer)
        if bert.model_type != "bert":
            raise ValueError(
                f"The Q-Former starts from BERT weights, but '{qformer}' is a {bert.model_type} model. Name a BERT "
                "checkpoint, or pass a Blip2xQFormerConfig for random weights."
            )
        shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
                  "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "layer_norm_eps",
                  "initializer_range", "pad_token_id")  # fmt: skip
        dec = bert.vocab_size if tokenizer is None else tokenizer.bos_token_id
        qformer_config = Blip2xQFormerConfig(
            **{name: getattr(bert, name) for name in shared},
            vocab_size=max(bert.vocab_size, dec + 1),
            bos_token_id=dec,
            eos_token_id=None if tokenizer is None else tokenizer.sep_token_id,
            mask_token_id=None if tokenizer is None else tokenizer.mask_token_id,
        )
    else:
        qformer_config = qformer or Blip2xQFormerConfig()
    if tokenizer is not None:
        check_tokenizer(qformer_config, tokenizer)
    return qformer_config


def _config(vision_model: nn.Module, qformer_config: Blip2xQFormerConfig, text_config, **fields) -> Blip2xConfig:
    # Dictionaries, not objects: two models built from one config must not share (and change) each other's.
    return Blip2xConfig(
        vision_config=vision_model.config.to_dict(),
        qformer_config=qformer_config.to_dict(),
        text_config=text_config and text_config.to_dict(),
        vision_layer_norm_eps=1e-6 if vision_model.config.model_type == "blip_2_vision_model" else 1e-5,
        **fields,
    )


def _mark_loaded(module: nn.Module) -> nn.Module:
    # transformers initialises what does not carry this mark; a loaded tower or LLM must be left alone.
    for part in module.modules():
        part._is_hf_initialized = True
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor._is_hf_initialized = True
    return module


def build_pretraining(
    model_class: type, vision_model: str | nn.Module, qformer: str | Blip2xQFormerConfig | None, *, tokenizer, **fields
):
    """See `Blip2xForPreTraining.from_unimodal`."""
    tower = _mark_loaded(load_vision_model(vision_model))
    config = _config(tower, _qformer_config(qformer, tokenizer), None, **fields)
    model = model_class(config, vision_model=tower)
    if isinstance(qformer, str):
        load_bert(model.model.qformer, AutoModel.from_pretrained(qformer).state_dict())
    return model


def build_generative(
    model_class: type,
    vision_model: str | nn.Module,
    language_model: str | nn.Module,
    qformer: str | Blip2xQFormerConfig | None,
    *,
    image_token_index: int | None,
    **fields,
):
    """See `Blip2xForConditionalGeneration.from_unimodal`."""
    tower, llm = _mark_loaded(load_vision_model(vision_model)), _mark_loaded(load_language_model(language_model))
    image_token_index = llm.config.vocab_size if image_token_index is None else image_token_index
    fit_image_token(llm, image_token_index)
    config = _config(tower, _qformer_config(qformer, None), llm.config, image_token_index=image_token_index, **fields)
    model = model_class(config, vision_model=tower, language_model=llm)
    if isinstance(qformer, str):
        load_bert(model.model.qformer, AutoModel.from_pretrained(qformer).state_dict())
    fit_soft_prompt(model)
    return model


def hand_over(
    model_class: type,
    stage1: nn.Module,
    language_model: str | nn.Module,
    *,
    image_token_index: int | None,
    use_qformer_text_input: bool,
):
    """A generative model with the tower and Q-Former of `stage1` and the given language model, and a `HandOver`."""
    llm = _mark_loaded(load_language_model(language_model))
    image_token_index = llm.config.vocab_size if image_token_index is None else image_token_index
    fit_image_token(llm, image_token_index)
    config = Blip2xConfig(
        **{
            **{name: getattr(stage1.config, name) for name in ("num_query_tokens", "image_text_hidden_size")},
            **{name: getattr(stage1.config, name) for name in ("vision_feature_layer", "vision_layer_norm_eps")},
        },
        vision_config=stage1.config.vision_config.to_dict(),
        qformer_config=stage1.config.qformer_config.to_dict() | {"use_qformer_text_input": use_qformer_text_input},
        text_config=llm.config.to_dict(),
        image_token_index=image_token_index,
    )
    model = model_class(config, vision_model=_mark_loaded(stage1.model.vision_model), language_model=llm)
    source, target = stage1.state_dict(), model.state_dict()
    shared = {name: tensor for name, tensor in source.items() if name in target}
    model.load_state_dict(shared, strict=False)
    fit_soft_prompt(model)
    report = HandOver(
        loaded=list(shared),
        dropped=[name for name in source if name not in target],
        new=[name for name in target if name not in source],
    )
    return model, report


@torch.no_grad()
def fit_soft_prompt(model: nn.Module) -> None:
    """Scale the new projection so that the soft prompt starts at the mean norm of the language model's embeddings.

    Query outputs leave a LayerNorm, so their mean square is |weight|^2 + |bias|^2 over its channels, whatever the image, and
    that of their projection by random weights is |projection|^2 / channels times as much. Unscaled, a prompt of several
    times the norm of words drowns in the residual stream what the first layers add to it.
    """
    norm, projection = model.model.qformer.layers[-1].query_feed_forward.layernorm, model.language_projection
    mean_square = norm.weight.float().square().sum() + norm.bias.float().square().sum()
    start = (mean_square / len(norm.weight)).sqrt() * projection.weight.float().norm()
    projection.weight.mul_(embedding_norm(model.get_input_embeddings()) / start)


def embedding_norm(embeddings: nn.Module) -> float:
    """Mean norm of what a language model's embedding layer gives, over at most NORMED of its words, evenly chosen."""
    rows = getattr(embeddings, "num_embeddings", len(embeddings.weight))  # an adapter's wrapper has the weight alone
    ids = torch.arange(0, rows, max(1, rows // NORMED), device=embeddings.weight.device)
    # By the layer, not from its weight: Gemma 3 scales there, by the root of its width.
    return embeddings(ids).float().norm(dim=-1).mean().item()


def fit_image_token(language_model: nn.Module, image_token_index: int) -> None:
    """Give the LLM a row for `<image>` where its vocabulary has none. The row is never looked up: features replace it.

    Generation needs it all the same: penalties and constraints index the scores by the ids of the prompt.
    """
    table = language_model.get_input_embeddings()
    rows = getattr(table, "num_embeddings", table.weight.shape[0])  # an adapter's wrapper has the weight alone
    if image_token_index >= rows:
        trainable = [p.requires_grad for p in language_model.parameters()]
        language_model.resize_token_embeddings(image_token_index + 1, mean_resizing=False)
        for parameter, flag in zip(language_model.parameters(), trainable):
            parameter.requires_grad_(flag)


def load_bert(qformer: QFormer, bert: dict[str, torch.Tensor]) -> None:
    """Start a Q-Former from a BERT's weights; the query feed-forward gets a copy of BERT's (paper, section 3.1).

    Cross-attention, query tokens and the row of [DEC] are not in BERT and keep their random start. BERT adds a segment
    embedding, that of segment 0 here, to every position: it goes into the position embeddings, so that text alone gives
    exactly BERT's output. (The official implementation drops it: small sentence encoders lose much of what they know.)
    """
    bert = {name.removeprefix("bert."): tensor for name, tensor in bert.items()}
    taken: dict[str, torch.Tensor] = {}
    for name in qformer.state_dict():
        source = bert_name(name)
        if source is not None:
            if source not in bert:
                raise ValueError(f"The BERT checkpoint has no tensor '{source}', which '{name}' should start from.")
            taken[name] = bert[source]
    positions = "embeddings.position_embeddings.weight"
    if positions in taken and "embeddings.token_type_embeddings.weight" in bert:
        taken[positions] = taken[positions] + bert["embeddings.token_type_embeddings.weight"][0]
    words = "embeddings.word_embeddings.weight"
    if words in taken:
        grown = qformer.state_dict()[words].clone()
        grown[: len(taken[words])] = taken[words]
        taken[words] = grown
    qformer.load_state_dict(taken, strict=False)


def bert_name(name: str) -> str | None:
    """Name in a BERT checkpoint of the tensor that the Q-Former's tensor `name` starts from; None if it is new."""
    if "crossattention" in name:
        return None
    if name.startswith("layernorm."):
        return name.replace("layernorm.", "embeddings.LayerNorm.")
    if not name.startswith("layers."):
        return name
    renames = {
        ".attention.query.": ".attention.self.query.",
        ".attention.key.": ".attention.self.key.",
        ".attention.value.": ".attention.self.value.",
        ".attention.dense.": ".attention.output.dense.",
        ".attention.layernorm.": ".attention.output.LayerNorm.",
    }
    for feed_forward in (".query_feed_forward", ".text_feed_forward"):
        renames[f"{feed_forward}.up."] = ".intermediate.dense."
        renames[f"{feed_forward}.down."] = ".output.dense."
        renames[f"{feed_forward}.layernorm."] = ".output.LayerNorm."
    for ours, theirs in renames.items():
        if ours in name:
            return "encoder.layer." + name.removeprefix("layers.").replace(ours, theirs)
    raise ValueError(f"No BERT name for '{name}'.")


def generation_config_of(model: nn.Module) -> object:
    """The language model's own generation config; it never writes the image placeholder."""
    generation_config = copy.deepcopy(model.language_model.generation_config)
    generation_config.suppress_tokens = [model.config.image_token_index]
    return generation_config
