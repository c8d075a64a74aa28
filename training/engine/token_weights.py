"""Every supervised token of an optimiser step weighs the same, however its global batch is cut.

A step's global batch is spread over forwards (gradient accumulation) and processes, and their texts differ in length: a
mean of their means would weigh the words of a short text more than those of a long one.
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator


def tokens_per_forward(
    accelerator: Accelerator, batches: list[dict], count_tokens: Callable[[dict], torch.Tensor]
) -> torch.Tensor:
    """Supervised tokens of a step, a mean over its forwards and processes: the models' `num_items_in_batch`.

    A forward's loss is the sum over its tokens, divided by this. accelerate then divides by the number of forwards, and
    DDP, FSDP or DeepSpeed by the number of processes. What comes out, loss and gradient, is the sum over all tokens of
    the step divided by their number.

    Args:
        batches: this process's micro-batches of the step.
    """
    own = torch.stack([count_tokens(batch) for batch in batches]).sum()
    tokens = accelerator.reduce(own.to(accelerator.device, torch.float32), "sum")
    return tokens.clamp(min=1) / (len(batches) * accelerator.num_processes)
