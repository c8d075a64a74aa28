"""What every training script does with its data, model and collator: batches, optimiser, schedule, loop, checkpoint."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from modeling_blip2x import Blip2xProcessor

from ..arguments.training import PretrainingArguments
from ..data.bad_rows import record_skips
from ..data.caption_dataset import CaptionDataset, JointDataset, make_loader
from ..data.feature_cache import use_feature_cache
from ..data.image_processor import has_other_size
from ..data.order import BatchOrder, visit_order
from ..data.splits import steps_of
from ..models.lora import LoraCheckpoint, add_lora
from ..reporting.health import Watch, query_similarity
from .best import Best
from .checkpoint import is_finished, read_state
from .finish import finish
from .optimizer import build_optimizer, learning_rate_at
from .start import open_output_dir, seed_training
from .train_loop import plain_step, train


def already_finished(args: PretrainingArguments, accelerator: Accelerator, max_steps: int) -> bool:
    """True, and a line that says so, when the folder holds the whole run and is not to be started over."""
    if args.overwrite_output_dir or not is_finished(Path(args.output_dir), max_steps):
        return False
    accelerator.print(f"{args.output_dir} is finished: {max_steps} steps. Pass --overwrite_output_dir to start over.")
    return True


def warm_up(warmup_steps: int, max_steps: int, accelerator: Accelerator) -> int:
    """Steps of warm-up; a tenth of a run that would end within them, which would train next to nothing."""
    if warmup_steps < max_steps:
        return warmup_steps
    shorter = max_steps // 10
    accelerator.print(
        f"--warmup_steps is {warmup_steps}, but the run has {max_steps} steps: warming up for {shorter} instead. Small data "
        "wants a higher --learning_rate too, such as 5e-4, and more --max_steps."
    )
    return shorter


def fit(
    args: PretrainingArguments,
    accelerator: Accelerator,
    model: torch.nn.Module,
    processor: Blip2xProcessor,
    train_set: CaptionDataset | JointDataset,
    eval_set: CaptionDataset | JointDataset | None,
    collator: Callable[[list[dict]], dict],
    *,
    validate: Callable[[bool], dict],
    forward_inputs: Callable[[int], dict] = lambda forward: {},
    forward_backward: Callable = plain_step,
) -> None:
    """Train `model`, its frozen parts chosen already, and make the run's root a complete checkpoint.

    Args:
        collator: of training batches.
        validate: figures of the model as it is, on all processes; its argument says whether it is the last time.
        forward_inputs: more arguments for the model, given the number of the forward.
        forward_backward: of (accelerator, model, inputs); leaves gradients, returns the outputs.
    """
    output_dir, max_steps = Path(args.output_dir), steps_of(args, accelerator, train_set)
    model.check_processor(processor)
    model.config.interpolate_pos_encoding = has_other_size(model, processor)
    if args.lora:
        add_lora(model, args.lora)
    accelerator.print(model.trainable_parameters_summary())
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.torch_compile:
        model.compile()
    if args.feature_cache:
        splits = {args.train_split: train_set} | ({args.eval_split: eval_set} if eval_set else {})
        use_feature_cache(args.feature_cache, model, processor.image_processor, splits)

    # Batches, from where an earlier run of this folder stopped
    open_output_dir(args, accelerator)
    state = read_state(output_dir)
    record_skips(accelerator, output_dir, args.max_skip_fraction, train_set, eval_set, state["samples_seen"])
    parts = train_set.parts
    order = BatchOrder(
        visit_order([len(part) for part in parts], [part.shards for part in parts], args.dataset_weights, args.seed),
        args.per_device_train_batch_size,
        (max_steps - state["step"]) * args.gradient_accumulation_steps,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        samples_seen=state["samples_seen"],
    )
    on_gpu = accelerator.device.type == "cuda"
    batches = make_loader(train_set, order, collator, args.dataloader_num_workers, pin_memory=on_gpu)
    optimizer = build_optimizer(
        model,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        layer_decay=getattr(args, "layer_decay", 1.0),
    )
    schedule = functools.partial(
        learning_rate_at,
        max_steps=max_steps,
        warmup_steps=warm_up(args.warmup_steps, max_steps, accelerator),
        peak=args.learning_rate,
        floor=args.min_learning_rate,
    )
    watch = Watch(args.warmup_steps, say=lambda text: accelerator.print(f"\n{text}"))
    best = Best(args.metric_for_best_model, args.best_is_greatest)
    seed_training(args.seed, accelerator)
    averages = train(
        accelerator,
        model,
        optimizer,
        batches,
        output_dir=output_dir,
        max_steps=max_steps,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        max_grad_norm=args.max_grad_norm,
        learning_rate=schedule,
        logging_steps=args.logging_steps,
        save_steps=args.save_steps,
        save_total_limit=args.save_total_limit,
        eval_steps=args.eval_steps,
        validate=lambda: with_similarity(model, validate, final=False),
        best=best,
        watch=watch,
        ema_decay=args.ema_decay,
        forward_inputs=forward_inputs,
        forward_backward=forward_backward,
    )
    checkpoint = LoraCheckpoint(model, processor if args.merge_lora else None) if args.lora else model
    with averages.in_place() if averages else contextlib.nullcontext():
        finish(
            accelerator,
            model,
            [checkpoint, processor],
            output_dir=output_dir,
            max_steps=max_steps,
            figures=with_similarity(model, validate, final=True),
            best=best,
            watch=watch,
            save_total_limit=args.save_total_limit,
            load_best_model=args.load_best_model_at_end,
            averaged=averages is not None,
        )


def with_similarity(model: torch.nn.Module, validate: Callable[[bool], dict], final: bool) -> dict[str, float]:
    """Figures of a validation, and how alike the queries are in its first batch."""
    with query_similarity(model) as similarity:
        figures = validate(final)
    return figures | similarity if figures else {}
