"""AdamW and the learning-rate schedule of the paper (section 3.4)."""

import math

import torch


def build_optimizer(
    model: torch.nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; biases, norms and other 1-d parameters are not decayed."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)


def learning_rate_at(
    step: int, *, max_steps: int, warmup_steps: int, peak: float, floor: float, start: float = 1e-6
) -> float:
    """Linear from `start` to `peak` during warm-up, then a cosine that reaches `floor` at `max_steps`.

    A function of the step alone, so that resuming needs no scheduler state.
    """
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
