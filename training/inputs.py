"""What all training scripts prepare alike: accelerator, folder of the run, image processor, data sets."""

import json
import math
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration, set_seed
from checkpoint import clear_output_dir
from data import CaptionDataset, JointDataset
from sharding import check_processes, plan_deepspeed, shard_on_cpu
from sources import image_start, load_rows
from transformers import AutoImageProcessor

from blip2x_training.arguments.parsing import changed_fields, save_arguments
from blip2x_training.arguments.training import PretrainingArguments
from blip2x_training.reporting.trackers import choose_tracker
from blip2x_training.system.environment import describe_environment


def start_run(args: PretrainingArguments, unused_parameters: bool = False) -> Accelerator:
    """Accelerator and seeds, the same on every process until `seed_training`."""
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
            DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=unused_parameters)
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


def open_output_dir(args: PretrainingArguments, accelerator: Accelerator) -> Path:
    """Create the run's folder, or clear it to start over; write config.yaml as used, and start the trackers.

    Called when data and model are ready: a mistake in the fields neither leaves a folder nor costs an earlier run.
    """
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        if args.overwrite_output_dir:
            clear_output_dir(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        for change in changed_fields(args, output_dir / "config.yaml"):
            accelerator.print(f"Continuing with another field than before: {change}")
        save_arguments(args, output_dir / "config.yaml")
        environment = describe_environment(args.seed, accelerator.num_processes)
        (output_dir / "environment.json").write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.log_with:
        accelerator.init_trackers(output_dir.name)
    return output_dir


def load_image_processor(source: str, image_size: int | None):
    """The image processor of a tower or checkpoint folder; `image_size` resizes to that square without cropping."""
    try:
        loaded = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{source} has no image processor ({error}). Give a folder or id with preprocessor_config.json."
        ) from error
    if image_size is not None:
        resize_to(loaded, image_size)
    return loaded


def resize_to(image_processor, side: int) -> None:
    """Let an image processor resize to a square, without cropping."""
    size = {"height": side, "width": side}
    image_processor.size = size if isinstance(image_processor.size, dict) else type(image_processor.size)(**size)
    image_processor.do_center_crop = False


def output_size(image_processor) -> tuple[int, int]:
    """(height, width) of the pixels an image processor gives."""
    crop = getattr(image_processor, "crop_size", None) if getattr(image_processor, "do_center_crop", False) else None
    size = dict(crop or image_processor.size)
    side = size.get("shortest_edge")
    height, width = size.get("height") or side, size.get("width") or side
    if not height or not width:
        raise ValueError(f"The image processor's size {size} does not tell height and width. Pass --image_size.")
    return height, width


def load_dataset_split(
    args: PretrainingArguments,
    accelerator: Accelerator,
    split: str,
    crop_size: tuple[int, int] | None,
    draw_text: bool,
    prompt: str = "",
    prompt_column: str | None = None,
) -> CaptionDataset | JointDataset:
    """One split of each data set, as one; the main process reads first, so that others find datasets' cache."""
    parts, known_images = [], {}
    for number, dataset in enumerate(args.dataset):
        with accelerator.main_process_first():
            rows = load_rows(dataset, split, args.image_folder)
        part = CaptionDataset(
            rows,
            image_column=args.image_column,
            text_column=args.text_column,
            prompt_column=prompt_column,
            prompt=prompt,
            clean_captions=args.clean_captions,
            folder=image_start(dataset, args.image_folder),
            seed=f"{args.seed}/{number}" if number else args.seed,
            crop_size=crop_size,
            draw_text=draw_text,
            source=(dataset, split),
            known_images=known_images,
        )
        parts.append(part)
    return JointDataset(parts) if len(parts) > 1 else parts[0]


def count_steps(args: PretrainingArguments, num_rows: int, num_processes: int) -> int:
    """Optimiser steps of the run: max_steps, or as many as num_train_epochs passes over the rows take."""
    samples = args.per_device_train_batch_size * num_processes * args.gradient_accumulation_steps
    return args.max_steps or max(1, math.ceil(args.num_train_epochs * num_rows / samples))


def seed_training(seed: int, accelerator: Accelerator) -> None:
    """From here on random numbers (dropout) differ between processes."""
    set_seed(seed, device_specific=True)
