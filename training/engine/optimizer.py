"""AdamW and the learning-rate schedule of the paper (section 3.4), layer-wise decay and averaged weights."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

TOWER = re.compile(r"(^|\.)vision_model\.")
LAYER = re.compile(r"\.(?:layers?|blocks?|stages)\.(\d+)\.")  # as transformers names the layers of its vision models


def build_optimizer(
    model: torch.nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    layer_decay: float = 1.0,
    pretrained: re.Pattern[str] | None = None,
    pretrained_scale: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; biases, norms and other 1-d parameters are not decayed.

    layer_decay: layer n of a vision tower of L layers trains at learning_rate * layer_decay ** (L - n), its embeddings
    as layer -1, what comes after its layers and everything outside the tower at learning_rate. Parameters whose names
    `pretrained` finds train at learning_rate * pretrained_scale. A group carries its factor as `lr_scale`.
    """
    depth = tower_depth(model)
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = layer_decay ** layers_above(name, depth)
            if pretrained is not None and pretrained.search(name):
                scale *= pretrained_scale
            groups.setdefault((scale, parameter.ndim >= 2), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": weight_decay if decays else 0.0,
                "lr_scale": scale,
                "lr": learning_rate * scale,
            }
            for (scale, decays), parameters in groups.items()
        ],
        lr=learning_rate,
        betas=betas,
        fused=True,  # fused: one pass over a parameter and its state, where torch's loop makes ten on a CPU
    )


def tower_depth(model: torch.nn.Module) -> int:
    """Number of layers of the vision tower."""
    numbers = [number_of_layer(name) for name, _ in model.named_parameters() if TOWER.search(name)]
    return 1 + max((number for number in numbers if number is not None), default=-1)


def number_of_layer(name: str) -> int | None:
    """Layer of a tower's parameter, counted from 0; -1 for its embeddings, None for what comes after the layers."""
    found = LAYER.search(name)
    if found:
        return int(found.group(1))
    return -1 if "embed" in name or "stem" in name else None


def layers_above(name: str, depth: int) -> int:
    """How many layers of the tower lie above a parameter; 0 for what is not in them. The last layer has 1 above: the end."""
    number = number_of_layer(name) if TOWER.search(name) else None
    return 0 if number is None else depth - number


@dataclass(frozen=True)
class Schedule:
    """Linear from `start` to `peak` during warm-up, then a cosine that reaches `floor` at `max_steps`.

    A function of the step alone, so that resuming needs no scheduler state.
    """

    max_steps: int
    warmup_steps: int
    peak: float
    floor: float
    start: float = 1e-6

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.start + (self.peak - self.start) * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        return self.floor + (self.peak - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)


class AveragedWeights:
    """Exponential moving average of the trained parameters (EMA), kept in fp32 beside them.

    The decay of update n is min(decay, (1 + n) / (10 + n)): the first steps, far from the end, are forgotten soon.
    """

    # Not torch's AveragedModel: it copies the whole model, the frozen tower and language model too, averages in the
    # parameters' own dtype, where bfloat16 rounds small updates away, and its EMA has a constant decay.

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, average in self.averages.items():
            average.lerp_(self.parameters[name].detach().float(), weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Context in which the model's weights are the averages, to validate and to save."""
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._put(self.averages)
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
