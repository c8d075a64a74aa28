"""LoRA by one argument, `--lora lm|qformer|vision|REGEX`.

The run's root holds the whole model without the adapter, and the adapter beside it; `from_pretrained` loads both where
peft is installed. `--merge_lora` also writes `merged/`, a model like any other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from modeling_blip2x import Blip2xProcessor
from modeling_blip2x.lora_blip2x import lora_targets


def add_lora(model: torch.nn.Module, preset: str, rank: int = 8, alpha: int = 16, dropout: float = 0.05) -> None:
    """Put a trainable adapter on a part. What was trainable before stays so, but for the layers that got one."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    targets = lora_targets(model, preset)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable or "lora_" in name)


@contextmanager
def plain_layers(model: torch.nn.Module) -> Iterator[None]:
    """The model without its adapter, as if it had never had one."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer.base_layer)
        model._hf_peft_config_loaded = False  # else transformers saves the adapter alone
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        model._hf_peft_config_loaded = True


@dataclass
class LoraCheckpoint:
    """Saves a model with an adapter as a whole model without it plus the adapter's files, all in one folder."""

    model: torch.nn.Module
    merged_processor: Blip2xProcessor | None = None  # given: merged/ is written too, with this processor

    def save_pretrained(self, folder: Path) -> None:
        self.model.save_pretrained(folder)  # the adapter
        with plain_layers(self.model):
            self.model.save_pretrained(folder)
        if self.merged_processor is not None:
            self.save_merged(Path(folder) / "merged")
            self.merged_processor.save_pretrained(Path(folder) / "merged")

    def save_merged(self, folder: Path) -> None:
        """The model with the adapter added to its weights; the one in memory is left as it was, to rounding."""
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        for layer in layers:
            layer.merge()
        try:
            with plain_layers(self.model):
                self.model.save_pretrained(folder)
        finally:
            for layer in layers:
                layer.unmerge()
