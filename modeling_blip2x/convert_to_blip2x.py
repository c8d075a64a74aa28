"""Our checkpoints turned into those of transformers' BLIP-2 classes and of LAVIS.

What the target cannot hold is an error where outputs would change, and a printed note where they would not.
"""

from pathlib import Path

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from .configuration_blip2x import Blip2xConfig
from .tensor_names_blip2x import lavis_names, transformers_names
from .weight_files_blip2x import Weight, read_weights

TEMPERATURE_NOTE = "The ITC temperature is lost: transformers' retrieval class gives plain cosines."
ITG_NOTE = "The ITG head is lost: transformers' retrieval class cannot caption."


def read_own(folder: str | Path) -> tuple[Blip2xConfig, dict[str, Weight]]:
    """Config and tensors of a blip2x folder. Raises ValueError for a LoRA adapter that was not merged."""
    if (Path(folder) / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds a LoRA adapter that is not merged, and the target has no place for it. Train with "
            "--merge_lora and export its merged/ folder, or merge it: PeftModel.merge_and_unload()."
        )
    config = Blip2xConfig.from_pretrained(folder)
    return config, read_weights(folder)


def export_transformers(
    config: Blip2xConfig, weights: dict[str, Weight]
) -> tuple[type[PreTrainedModel], PreTrainedConfig, dict[str, Weight], list[str]]:
    """Class, config and tensors of transformers, and notes on what is lost.

    Raises ValueError for a tower other than BLIP-2's own, or one that is read at another layer than its last.
    """
    _require_eva_tower(config, "transformers' BLIP-2 classes")
    is_stage1 = config.text_config is None
    instruct = not is_stage1 and config.qformer_config.use_qformer_text_input
    notes, renamed, table = [], {}, transformers_names(instruct)
    for name, weight in weights.items():
        if is_stage1 and (name == "temperature" or name.startswith("itg_head.")):
            continue
        theirs = table.theirs(name)
        if theirs is None:
            raise ValueError(f"transformers' BLIP-2 classes have no place for '{name}'.")
        renamed[theirs] = weight.map(lambda t: t[None], (1, *weight.shape)) if theirs == "query_tokens" else weight
    if is_stage1:
        notes += [TEMPERATURE_NOTE, ITG_NOTE]
    vision = config.vision_config.to_dict()
    if config.vision_layer_norm_eps != vision["layer_norm_eps"]:
        notes.append(
            f"ln_vision gets epsilon {vision['layer_norm_eps']:g}, that of the tower, in place of "
            f"{config.vision_layer_norm_eps:g}: transformers has one for both. Outputs differ in the sixth digit."
        )
    qformer = config.qformer_config.to_dict() | {"model_type": "instructblip_qformer" if instruct else "blip_2_qformer"}
    common = {
        "vision_config": vision,
        "qformer_config": qformer,
        "num_query_tokens": config.num_query_tokens,
        "image_token_index": config.image_token_index,
    }
    if instruct:
        theirs = InstructBlipConfig(**common, text_config=config.text_config.to_dict())
        return InstructBlipForConditionalGeneration, theirs, renamed, notes
    common["image_text_hidden_size"] = config.image_text_hidden_size
    if is_stage1:
        return Blip2ForImageTextRetrieval, Blip2Config(**common), renamed, notes
    return (
        Blip2ForConditionalGeneration,
        Blip2Config(**common, text_config=config.text_config.to_dict()),
        renamed,
        notes,
    )


def export_lavis(config: Blip2xConfig, weights: dict[str, Weight]) -> tuple[dict[str, Weight], list[str]]:
    """Tensors under the official names, and notes on what is lost. Raises ValueError for parts LAVIS has no class for."""
    _require_eva_tower(config, "LAVIS")
    kind = None
    if config.text_config is not None:
        kinds = {"opt": "opt", "t5": "t5", "llama": "llm"}
        kind = kinds.get(config.text_config.model_type)
        if kind is None:
            raise ValueError(
                f"LAVIS has no BLIP-2 class for a {config.text_config.model_type} language model, only for "
                f"{', '.join(kinds)}."
            )
    notes, renamed, table = [], {}, lavis_names(kind)
    for name, weight in weights.items():
        theirs = table.theirs(name)
        if theirs is None:
            raise ValueError(f"LAVIS has no place for '{name}'.")
        if theirs == "query_tokens":
            renamed[theirs] = weight.map(lambda t: t[None], (1, *weight.shape))
        elif theirs == "temp":
            renamed[theirs] = weight.map(lambda t: t.reshape(()), ())
        elif theirs.endswith("attn.qkv.bias"):
            query, key, value = weight.read().chunk(3)
            if key.any() and not notes:
                notes.append(
                    "The tower's key biases are lost: LAVIS has none. A bias that all keys share does not change attention."
                )
            renamed[theirs.replace("qkv.bias", "q_bias")] = Weight.of(query)
            renamed[theirs.replace("qkv.bias", "v_bias")] = Weight.of(value)
        else:
            renamed[theirs] = weight
    words = "Qformer.bert.embeddings.word_embeddings.weight"
    if config.text_config is None:
        renamed["Qformer.cls.predictions.decoder.weight"] = renamed[words]
        renamed["Qformer.cls.predictions.decoder.bias"] = renamed["Qformer.cls.predictions.bias"]
    return renamed, notes


def check_exported(model_class: type[PreTrainedModel], config: PreTrainedConfig, weights: dict[str, Weight]) -> None:
    """Raise ValueError unless names and shapes are those of an empty model of the target class."""
    with torch.device("meta"):
        model = model_class(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [n for n in expected if n not in weights and n not in model.all_tied_weights_keys]
    wrong += [n for n in weights if weights[n].shape != expected.get(n)]
    if wrong:
        raise ValueError(f"{model_class.__name__} of this config does not fit tensors {', '.join(wrong[:20])}.")


def _require_eva_tower(config: Blip2xConfig, target: str) -> None:
    tower = config.vision_config.model_type
    if tower != "blip_2_vision_model":
        raise ValueError(
            f"The vision tower is a {tower}, but {target} can hold only BLIP-2's own EVA tower (blip_2_vision_model). "
            "Serve this checkpoint with blip2x, or with its code exported (trust_remote_code)."
        )
    if config.vision_feature_layer != -1:
        raise ValueError(
            f"vision_feature_layer is {config.vision_feature_layer}, but {target} always reads the tower's last layer."
        )
