"""What all training scripts prepare alike: accelerator, folder of the run, image processor, data sets."""

import json
import os
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed

from ..arguments.parsing import changed_fields, save_arguments
from ..arguments.training import RunArguments
from ..reporting.trackers import choose_tracker, start_trackers
from ..system.atomic_files import write_whole
from ..system.environment import describe_environment
from .checkpoint import clear_output_dir
from .sharding import check_processes, plan_deepspeed, shard_on_cpu

MOST_WORKERS, FEWEST_CORES = 8, 4


def start_run(args: RunArguments, unused_parameters: bool = False) -> Accelerator:
    """Accelerator and seeds, the same on every process until `seed_training`."""
    if args.bf16 is None:
        args.bf16 = not args.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    if args.dataloader_num_workers is None:
        args.dataloader_num_workers = 0 if args.feature_cache or not torch.cuda.is_available() else workers_of_machine()
    tracker, notice = choose_tracker(args.report_to)
    accelerator = Accelerator(
        mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=tracker,
        project_config=ProjectConfiguration(
            args.output_dir, logging_dir=str(Path(args.output_dir or "") / "tensorboard")
        ),
        # Frozen towers have buffers (BatchNorm) that never change: nothing to broadcast.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=unused_parameters),
            # Others wait while one process validates, saves or reads: torch's ten minutes may be less than that takes.
            InitProcessGroupKwargs(timeout=timedelta(seconds=args.process_timeout)),
        ],
    )
    check_processes(accelerator)
    shard_on_cpu(accelerator)
    plan_deepspeed(accelerator, args.per_device_train_batch_size, args.gradient_accumulation_steps, args.max_grad_norm)
    if args.fp16 and accelerator.device.type == "cpu":  # where accelerate would stay with float32 and not say so
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    if notice:
        accelerator.print(notice)
    set_seed(args.seed)
    return accelerator


def workers_of_machine() -> int:
    """Loader processes for each training process of this machine: its share of the cores but one, at most 8; 0 of few."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MOST_WORKERS, share - 1) if share >= FEWEST_CORES else 0


def open_output_dir(args: RunArguments, accelerator: Accelerator) -> Path:
    """Create the run's folder, or clear it to start over; write config.yaml as used, and start the trackers.

    Called when data and model are ready: a mistake in the fields neither leaves a folder nor costs an earlier run.
    """
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        if args.overwrite_output_dir:
            clear_output_dir(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        try:
            for change in changed_fields(args, output_dir / "config.yaml"):
                accelerator.print(f"Continuing with another field than before: {change}")
        except ValueError as error:  # it is written anew, and nothing but this comparison reads it
            accelerator.print(f"{error} Whether fields are others than before cannot be told; it is written anew.")
        save_arguments(args, output_dir / "config.yaml")
        environment = describe_environment(args.seed, accelerator.num_processes)
        write_whole(output_dir / "environment.json", json.dumps(environment, indent=1) + "\n")
    accelerator.wait_for_everyone()
    if accelerator.log_with:
        start_trackers(accelerator, output_dir, asdict(args))
    return output_dir


def seed_training(seed: int, accelerator: Accelerator) -> None:
    """From here on random numbers (dropout) differ between processes."""
    set_seed(seed, device_specific=True)
