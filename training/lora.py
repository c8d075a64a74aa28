"""LoRA on the language model by one argument.

The adapter sits on the LLM's linear layers and nowhere else: `target_modules` is a regular expression anchored on
`language_model`, for a list of names such as q_proj would also hit a vision tower. The run's root holds the whole model
without the adapter, and the adapter beside it; `from_pretrained` loads both where peft is installed.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer


def lora_targets(model: torch.nn.Module) -> str:
    """A regular expression that matches the LLM's linear layers, the output layer left out."""
    head = model.get_output_embeddings()
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.language_model.named_modules()
        if module is not head and (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
    }
    if not names:
        raise ValueError(f"--lora lm finds no linear layer in {type(model.language_model).__name__}. Leave --lora out.")
    return rf"language_model\..*\.({'|'.join(sorted(map(re.escape, names)))})"


def add_lora(model: torch.nn.Module, rank: int = 8, alpha: int = 16, dropout: float = 0.05) -> None:
    """Put a trainable adapter on the frozen LLM. What was trainable before stays so."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=lora_targets(model)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable or "lora_" in name)


@dataclass
class LoraCheckpoint:
    """Saves a model with an adapter as a whole model without it plus the adapter's files, all in one folder."""

    model: torch.nn.Module

    def save_pretrained(self, folder: Path) -> None:
        model = self.model
        model.save_pretrained(folder)  # with an adapter attached, transformers saves the adapter alone
        layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        try:
            for name, layer in layers.items():
                model.set_submodule(name, layer.base_layer)
            model._hf_peft_config_loaded = False
            model.save_pretrained(folder)
        finally:
            for name, layer in layers.items():
                model.set_submodule(name, layer)
            model._hf_peft_config_loaded = True
