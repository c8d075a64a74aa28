"""LoRA by one argument, `--lora lm|qformer|vision|REGEX`.

The run's root holds the whole model without the adapter, and the adapter beside it; `from_pretrained` loads both where
peft is installed. `--merge_lora` also writes `merged/`, a model like any other.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from modeling_blip2x import Blip2xProcessor
from modeling_blip2x.lora_blip2x import lora_config


def add_lora(model: torch.nn.Module, preset: str) -> None:
    """Put a trainable adapter on a part. What was trainable before stays so, but for the layers that got one."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    config = lora_config(model, preset)
    config.modules_to_save = None  # the model itself holds and saves what else is trained
    # By peft itself: model.add_adapter of transformers 5.24 wants a peft newer than the newest there is, 0.21.
    config.base_model_name_or_path = model.name_or_path or None
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable or "lora_" in name)
        if "lora_" in name:  # peft gives it the dtype of its layer; what is trained is float32
            parameter.data = parameter.data.float()


def save_adapter(model: torch.nn.Module, folder: str | Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as a PeftModel around this model would."""
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(folder)


def remove_lora(model: torch.nn.Module) -> None:
    """Make the model what it was before `add_lora`: adapters are dropped, the layers below them stay as they are."""
    # peft's own unload() is a method of the wrapper PeftModel, and an injected adapter has no wrapper.
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    del model.peft_config
    for name, layer in layers.items():
        model.set_submodule(name, layer.get_base_layer())


@dataclass
class LoraCheckpoint:
    """Saves a model with an adapter as a whole model without it plus the adapter's files, all in one folder.

    Saving is the end of training: it takes the adapter off the model in memory.
    """

    model: torch.nn.Module
    merged_processor: Blip2xProcessor | None = None  # given: merged/ is written too, with this processor

    def save_pretrained(self, folder: Path) -> None:
        save_adapter(self.model, folder)
        remove_lora(self.model)
        self.model.save_pretrained(folder)
        if self.merged_processor is not None:
            merged = PeftModel.from_pretrained(self.model, folder).merge_and_unload()
            merged.save_pretrained(Path(folder) / "merged")
            self.merged_processor.save_pretrained(Path(folder) / "merged")
