"""Under `accelerate launch`: FSDP2 with the model's own units, DeepSpeed, and a check that processes found one another."""

import os

import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule


def check_processes(accelerator: Accelerator) -> None:
    """Raise ValueError if several processes were started and each thinks it is alone: all would write one folder."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and accelerator.num_processes == 1:
        raise ValueError(
            f"{started} processes were started, but there is no GPU and accelerate lets each run by itself. Set the "
            "environment variable ACCELERATE_USE_CPU=true, or start one process."
        )


def shard_on_cpu(accelerator: Accelerator) -> None:
    """accelerate applies FSDP and DeepSpeed configs on GPUs only, though both run over gloo too; this applies them anywhere."""
    if accelerator.distributed_type != DistributedType.MULTI_CPU:
        return
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        set_distributed_type(accelerator, DistributedType.FSDP)
    elif os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        plugin = DeepSpeedPlugin()
        plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.deepspeed_plugins = {"default": plugin}
        set_distributed_type(accelerator, DistributedType.DEEPSPEED)
        accelerator.state.select_deepspeed_plugin("default")


def set_distributed_type(accelerator: Accelerator, kind: DistributedType) -> None:
    """Set in both states: AcceleratorState copies what PartialState has whenever one is created."""
    PartialState().distributed_type = accelerator.state.distributed_type = kind


def plan_deepspeed(accelerator: Accelerator, batch_size: int, accumulation_steps: int, max_grad_norm: float) -> None:
    """DeepSpeed accumulates and clips by itself: the fields of the script count, not those of its config file."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.gradient_accumulation_steps = accumulation_steps
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_accumulation_steps": accumulation_steps,
            "gradient_clipping": max_grad_norm,
        }


def plan_sharding(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Under FSDP2: what is gathered and freed as a unit, before `accelerator.prepare`.

    With a language model, each layer of it and of the tower. Q-Former and heads stay with the root, whose parameters are
    gathered once a step: their methods are called one by one, and sharding hooks into forward alone. Stage 1 is all root,
    so that its validation can encode images on one process.

    Raises ValueError for FSDP of version 1, whose flat parameters are neither saved nor clipped by name here.
    """
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "The accelerate config shards by FSDP of version 1. Set fsdp_version: 2, as in "
            "training/configs/accelerate/fsdp2.yaml."
        )
    if not accelerator.is_fsdp2:
        return
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = None  # autocast chooses precisions, as without sharding; the loop enters it
    parts = model.frozen_candidates() if getattr(model, "language_model", None) is not None else []
    stacks = [module for part in parts for module in part.modules() if isinstance(module, torch.nn.ModuleList)]
    named = {name for part in parts for name in getattr(part, "_no_split_modules", None) or []}
    plugin.transformer_cls_names_to_wrap = sorted(named & {type(layer).__name__ for s in stacks for layer in s})


def keep_embeddings_whole(model: torch.nn.Module) -> None:
    """After `prepare`: ITG multiplies by the word embeddings outside their own forward, so they stay gathered."""
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, FSDPModule) and getattr(model, "language_model", None) is None:
        embeddings.set_reshard_after_forward(False)
