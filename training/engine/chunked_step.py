"""A training step in chunks (`itc_chunk_size`): the gradient of the whole batch with the memory of a chunk."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from modeling_blip2x.distributed_blip2x import average_gradients
from modeling_blip2x.grad_cache_blip2x import chunked_backward

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def chunked_step(chunk_size: int) -> Callable:
    """The step of a `Task` that trains in chunks.

    Loss scale, accumulation and autocast are accelerate's. DDP is passed by: see `grad_cache_blip2x`.
    """

    def step(accelerator: Accelerator, model: torch.nn.Module, inputs: dict):
        if accelerator.distributed_type in SHARDED:
            raise ValueError(
                f"--itc_chunk_size is {chunk_size}, but {accelerator.distributed_type.value} shards the model, and only "
                "its own forward and backward can gather it. Launch with plain data parallelism, or drop the field."
            )
        outputs = chunked_backward(
            accelerator.unwrap_model(model), chunk_size=chunk_size, accelerator=accelerator, **inputs
        )
        if accelerator.sync_gradients:
            average_gradients(model.parameters())
        return outputs

    return step
