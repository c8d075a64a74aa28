"""Checkpoints of other implementations turned into ours: names, shapes of tensors, and the config that fits them.

Nothing is loaded into a model. Names and shapes are compared with those of an empty model of the config (meta device),
so every tensor of the source is used or named in an error, and so is every one that is missing.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from .assembling_blip2x import load_language_model, load_vision_model
from .configuration_blip2x import Blip2xConfig, Blip2xQFormerConfig
from .generation_blip2x import Blip2xForConditionalGeneration
from .imagetext_blip2x import TEMPERATURE, ItgHead
from .pretraining_blip2x import Blip2xForPreTraining
from .tensor_names_blip2x import NameTable, lavis_names, mmpretrain_names, transformers_names
from .weight_files_blip2x import Weight, read_weights

TOWER, LLM = "model.vision_model.", "language_model."
COPY_OF = {  # in the official model these are the same parameter under two names
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


@dataclass
class Checkpoint:
    """A checkpoint under our names, before it is written. notes: what was left out or made new, a sentence each."""

    model_class: type[PreTrainedModel]
    config: Blip2xConfig
    weights: dict[str, Weight]
    notes: list[str] = field(default_factory=list)


def import_transformers(folder: str | Path) -> Checkpoint:
    """A folder of transformers' Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval or InstructBLIP."""
    theirs = AutoConfig.from_pretrained(folder)
    found = read_weights(folder)
    instruct = theirs.model_type == "instructblip"
    weights = rename(found, transformers_names(instruct), str(folder))
    is_stage1 = "itm_head.weight" in weights
    reads_text = instruct or is_stage1
    qformer = _fields_of(theirs.qformer_config) | {"use_qformer_text_input": reads_text}
    if not reads_text or qformer.get("bos_token_id") is None:
        qformer["bos_token_id"] = qformer["vocab_size"] - 1  # [DEC] is the last word of the published checkpoints
    config = Blip2xConfig(
        vision_config=theirs.vision_config.to_dict() | {"model_type": "blip_2_vision_model"},
        qformer_config=qformer,
        text_config=None if is_stage1 else theirs.text_config.to_dict(),
        num_query_tokens=theirs.num_query_tokens,
        image_text_hidden_size=theirs.image_text_hidden_size if is_stage1 else 256,
        image_token_index=None if is_stage1 else _image_token(theirs),
        vision_layer_norm_eps=theirs.vision_config.layer_norm_eps,  # transformers has one epsilon for both
        objectives=["itc", "itm"] if is_stage1 else ["itc", "itm", "itg"],
    )
    checkpoint = Checkpoint(Blip2xForPreTraining if is_stage1 else Blip2xForConditionalGeneration, config, weights)
    if is_stage1:
        _add_what_transformers_dropped(checkpoint)
    return checkpoint


def import_lavis(
    path: str | Path,
    overrides: dict | None = None,
    vision_model: str | None = None,
    language_model: str | None = None,
) -> Checkpoint:
    """A .pth or .safetensors file of LAVIS or mmpretrain.

    overrides: config fields that tensors do not tell, such as {"vision_config": {"num_attention_heads": 4}}; a
    config.json of ours will do. vision_model, language_model: id or folder of what the file does not hold.
    """
    found = read_weights(path)
    of_mmpretrain = any(name.startswith("multimodal_backbone.") for name in found)
    prefix = "multimodal_backbone." if of_mmpretrain else "Qformer."
    if not any(name.startswith(prefix) for name in found):
        raise ValueError(
            f"{path} holds no Q-Former (no tensor named Qformer.* or multimodal_backbone.*): it is not a BLIP-2 checkpoint "
            "of LAVIS or mmpretrain. Of transformers and blip2x name the folder, not the file."
        )
    if of_mmpretrain:
        is_stage1 = "text_neck.fc.weight" in found
        table = mmpretrain_names(retrieval=is_stage1)
        found = {n: w for n, w in found.items() if not n.startswith("data_preprocessor.")}
    else:
        kind = language_model_of(found)
        is_stage1 = kind is None
        table = lavis_names(kind)
    weights = rename(without_copies(found, prefix, str(path)), table, str(path))

    overrides = {
        k: v for k, v in (overrides or {}).items() if k not in ("model_type", "architectures", "transformers_version")
    }
    notes = []
    vision_config = dict(overrides.pop("vision_config", None) or {})
    feature_layer = overrides.pop("vision_feature_layer", -1)
    if any(name.startswith(TOWER) for name in weights):
        vision_config = _tower_shape(weights) | vision_config | {"model_type": "blip_2_vision_model"}
        if "num_attention_heads" not in vision_config:
            raise ValueError(
                f"The tower of {path} is {vision_config['hidden_size']} wide, and its tensors do not tell the number of "
                'attention heads. Pass --config FILE with {"vision_config": {"num_attention_heads": N}}.'
            )
    elif vision_model is not None:
        tower = load_vision_model(vision_model)
        weights |= {TOWER + name: Weight.of(tensor) for name, tensor in tower.state_dict().items()}
        vision_config = tower.config.to_dict()
        if tower.config.model_type == "clip_vision_model" and feature_layer == -1:
            feature_layer = -2  # the official CLIP tower ends one layer early
        notes.append(f"The vision tower comes from {vision_model}.")
    else:
        raise ValueError(
            f"{path} holds no vision tower (LAVIS saves only what it trained). Pass --vision_model ID_OR_FOLDER."
        )

    text_config = overrides.pop("text_config", None)
    if not is_stage1:
        text_config = _complete_language_model(path, weights, text_config, language_model, notes)
        overrides.setdefault("image_token_index", _free_token(text_config, language_model))
    shape = _qformer_shape(weights)
    config = Blip2xConfig(
        vision_config=vision_config,
        qformer_config=shape | _known_fields(overrides.pop("qformer_config", None) or {}),
        text_config=text_config if not is_stage1 else None,
        vision_feature_layer=feature_layer,
        **{
            "num_query_tokens": shape_of(weights, "model.query_tokens.weight", 2)[0],
            "vision_layer_norm_eps": 1e-5,
            **({"image_text_hidden_size": shape_of(weights, "vision_projection.weight", 2)[0]} if is_stage1 else {}),
            **overrides,
        },
    )
    return Checkpoint(Blip2xForPreTraining if is_stage1 else Blip2xForConditionalGeneration, config, weights, notes)


def language_model_of(found: dict) -> str | None:
    """How the official names of the language model begin; None in stage 1."""
    return next((kind for kind in ("opt", "t5", "llm") if f"{kind}_proj.weight" in found), None)


def rename(found: dict[str, Weight], table: NameTable, source: str) -> dict[str, Weight]:
    """Tensors under our names; raises ValueError naming all that have no counterpart."""
    weights, unknown = {}, []
    for name, weight in found.items():
        if name.endswith("position_ids"):
            continue  # a counter
        ours = table.ours(name)
        if ours is None:
            unknown.append(name)
        elif ours == "model.query_tokens.weight":
            weights[ours] = weight.map(lambda tensor: tensor[0], weight.shape[1:])
        elif ours == "temperature":
            weights[ours] = weight.map(lambda tensor: tensor.reshape(1), (1,))
        else:
            weights[ours] = weight
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors of {source} have no counterpart: {', '.join(sorted(unknown))}. It is not a BLIP-2 "
            "checkpoint of a known kind."
        )
    return weights


def check_complete(checkpoint: Checkpoint, source: str) -> None:
    """Compare names and shapes with an empty model of the config; raises ValueError naming what differs.

    A tied tensor may be absent; one that is there is kept, for FlanT5's lm_head is not tied whatever its config says.
    """
    with torch.device("meta"):
        model = checkpoint.model_class(checkpoint.config)
    empty = model.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in empty.items()}
    tied = set(model.all_tied_weights_keys)
    given = {name: weight.shape for name, weight in checkpoint.weights.items()}
    missing = [name for name in expected if name not in given and name not in tied]
    surplus = [name for name in given if name not in expected]
    misshapen = [f"{n} is {given[n]}, not {expected[n]}" for n in given if n in expected and given[n] != expected[n]]
    mistyped = [
        f"{name} is {weight.dtype}, not {empty[name].dtype}"
        for name, weight in checkpoint.weights.items()
        if name in empty and weight.dtype.is_floating_point != empty[name].dtype.is_floating_point
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
        for what, names in (
            ("missing", missing),
            ("without a place", surplus),
            ("of another shape", misshapen),
            ("of another kind", mistyped),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"The tensors of {source} do not make a {checkpoint.model_class.__name__} of this config:\n  "
            + "\n  ".join(problems)
            + "\nName the right --vision_model, --language_model or --config."
        )


def without_copies(found: dict[str, Weight], prefix: str, source: str) -> dict[str, Weight]:
    """Drop second names of one parameter, after comparing them, and join the tower's query and value biases."""
    kept = {}
    for name, weight in found.items():
        original = COPY_OF.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if original is not None:
            if prefix + original not in found or not torch.equal(weight.read(), found[prefix + original].read()):
                raise ValueError(
                    f"'{name}' differs from '{prefix}{original}', of which it is a copy in the official model. {source} is "
                    "not a BLIP-2 checkpoint, or was changed."
                )
        elif name.endswith("attn.q_bias"):
            value = found.get(name.replace("q_bias", "v_bias"))
            if value is None or value.shape != weight.shape:
                raise ValueError(
                    f"'{name}' of {source} has no v_bias of its shape beside it. Copy or download it again."
                )

            def join(query: torch.Tensor, value: Weight = value) -> torch.Tensor:
                return torch.cat([query, torch.zeros_like(query), value.read()])  # the keys have no bias

            kept[name.replace("q_bias", "qkv.bias")] = weight.map(join, (3 * torch.Size(weight.shape).numel(),))
        elif not name.endswith("attn.v_bias"):
            kept[name] = weight
    return kept


def _add_what_transformers_dropped(checkpoint: Checkpoint) -> None:
    """transformers' retrieval class holds neither the temperature nor the ITG head."""
    torch.manual_seed(0)
    head = ItgHead(checkpoint.config.qformer_config)
    torch.nn.init.zeros_(head.bias)
    checkpoint.weights |= {f"itg_head.{name}": Weight.of(tensor) for name, tensor in head.state_dict().items()}
    checkpoint.weights["temperature"] = Weight.of(torch.full((1,), TEMPERATURE))
    checkpoint.notes.append(
        f"transformers keeps neither the ITC temperature nor the ITG head: the temperature starts at {TEMPERATURE} "
        "(cosines are not touched by it), the ITG head at random (its captions mean nothing until it is trained)."
    )


def _complete_language_model(path, weights: dict[str, Weight], text_config, language_model: str | None, notes: list):
    """The LLM's config; its weights are added where the file has none."""
    in_file = any(name.startswith(LLM) for name in weights)
    if language_model is None and text_config is None:
        lacks = "names no config of its language model" if in_file else "holds no language model"
        raise ValueError(f"{path} {lacks}. Pass --language_model ID_OR_FOLDER.")
    if in_file:
        if text_config is None:
            text_config = AutoConfig.from_pretrained(language_model).to_dict()
        for name in ("model.decoder.embed_tokens.weight", "model.embed_tokens.weight", "shared.weight"):
            if LLM + name in weights:
                text_config["vocab_size"] = shape_of(weights, LLM + name, 2)[0]  # LAVIS adds tokens to Vicuna's
        return text_config
    if language_model is None:
        raise ValueError(f"{path} holds no language model. Pass --language_model ID_OR_FOLDER.")
    llm = load_language_model(language_model)
    weights |= {LLM + name: Weight.of(tensor) for name, tensor in llm.state_dict().items()}
    notes.append(f"The language model comes from {language_model}.")
    return llm.config.to_dict()


def load_tokenizer(name: str | None):
    """Tokenizer of an id or folder; None for a folder of weights alone, of which transformers would make an empty one."""
    files = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
    if name is None or (Path(name).is_dir() and not any((Path(name) / file).exists() for file in files)):
        return None
    return AutoTokenizer.from_pretrained(name)


def _free_token(text_config: dict, language_model: str | None) -> int:
    """Id for `<image>`: the first after the tokenizer's, where it is at hand, else the first after the vocabulary."""
    tokenizer = load_tokenizer(language_model)
    return text_config["vocab_size"] if tokenizer is None else len(tokenizer)


def _image_token(theirs) -> int:
    index = getattr(theirs, "image_token_index", None)
    return theirs.text_config.vocab_size if index is None else index


def _known_fields(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if name in Blip2xQFormerConfig.__annotations__}


def _fields_of(theirs) -> dict:
    return {name: value for name, value in _known_fields(theirs.to_dict()).items() if name != "encoder_hidden_size"}


def _tower_shape(weights: dict[str, Weight]) -> dict:
    """What tensors tell of an EVA tower's config."""
    patch = shape_of(weights, f"{TOWER}embeddings.patch_embedding.weight", 4)
    positions = shape_of(weights, f"{TOWER}embeddings.position_embedding", 3)[1] - 1
    shape = {
        "hidden_size": patch[0],
        "patch_size": patch[2],
        "image_size": round(positions**0.5) * patch[2],
        "intermediate_size": shape_of(weights, f"{TOWER}encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": _count_layers(weights, f"{TOWER}encoder.layers."),
    }
    return shape | ({"num_attention_heads": 16} if patch[0] == 1408 else {})  # ViT-g


def _qformer_shape(weights: dict[str, Weight]) -> dict:
    """What tensors tell of a Q-Former's config; heads are 64 wide, as in every BERT."""
    layers = "model.qformer.layers."
    count = _count_layers(weights, layers)
    crossing = [i for i in range(count) if f"{layers}{i}.crossattention.key.weight" in weights]
    width = shape_of(weights, f"{layers}0.query_feed_forward.up.weight", 2)
    shape = {
        "hidden_size": width[1],
        "intermediate_size": width[0],
        "num_hidden_layers": count,
        "num_attention_heads": max(1, width[1] // 64),
        "cross_attention_frequency": crossing[1] - crossing[0] if len(crossing) > 1 else 2,
        "use_qformer_text_input": "model.qformer.embeddings.word_embeddings.weight" in weights,
    }
    if shape["use_qformer_text_input"]:
        vocabulary = shape_of(weights, "model.qformer.embeddings.word_embeddings.weight", 2)[0]
        shape["vocab_size"], shape["bos_token_id"] = vocabulary, vocabulary - 1
        positions = shape_of(weights, "model.qformer.embeddings.position_embeddings.weight", 2)
        shape["max_position_embeddings"] = positions[0]
    return shape


def shape_of(weights: dict[str, Weight], name: str, dimensions: int) -> tuple[int, ...]:
    """Shape of a tensor that the config is read from.

    Raises:
        ValueError: it is missing, or has another number of dimensions.
    """
    if name not in weights:
        raise ValueError(f"The checkpoint has no tensor for {name!r}; it is not whole. Copy or download it again.")
    shape = weights[name].shape
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"The tensor for {name!r} has shape {shape}, but {dimensions} dimensions and no 0 are right.")
    return shape


def _count_layers(weights: dict[str, Weight], start: str) -> int:
    numbers = [name.removeprefix(start).split(".")[0] for name in weights if name.startswith(start)]
    layers = {int(number) for number in numbers if number.isdecimal()}
    if not layers or len(layers) <= max(layers):  # not 0, 1, 2, ...: also keeps a damaged number from asking for 10**9
        raise ValueError(f"The checkpoint has layers {sorted(layers)} under {start!r}; those from 0 on are expected.")
    return len(layers)
