"""What every training script does with its data, model and collator: batches, optimiser, schedule, loop, checkpoint."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator

from modeling_blip2x import Blip2xProcessor

from ..arguments.training import RunArguments
from ..data.bad_rows import record_skips
from ..data.caption_dataset import CaptionDataset, JointDataset, make_loader
from ..data.feature_cache import use_feature_cache
from ..data.image_processor import has_other_size
from ..data.killed_workers import workers_may_die
from ..data.order import BatchOrder, visit_order
from ..data.shard_cache import start_prefetcher
from ..data.splits import steps_of
from ..data.text_lengths import tell_what_is_cut
from ..evaluation.validation import leave_out_unreadable
from ..models.frozen_dtype import hold_frozen, refuse_unscaled_float16
from ..models.lora import add_lora
from ..reporting.health import Watch
from ..system.processes import on_main
from .best import Best
from .checkpoint import NOTHING_DONE, intact, is_finished, order_of, read_state
from .finish import finish
from .optimizer import Schedule
from .origin import check_origin, describe_data, describe_model
from .start import open_output_dir, seed_training
from .train_loop import Task, train, validate


def already_finished(
    args: RunArguments,
    accelerator: Accelerator,
    train_set: CaptionDataset | JointDataset,
    eval_set: CaptionDataset | JointDataset | None,
) -> bool:
    """True, and a line that says so, when the folder holds the whole run and is not to be started over.

    Raises ValueError where that run had other data.
    """
    max_steps = steps_of(args, accelerator, train_set)
    if args.overwrite_output_dir or not is_finished(Path(args.output_dir), max_steps):
        return False
    described = on_main(accelerator, lambda: describe_data(train_set, eval_set))
    check_origin(args, accelerator, read_state(Path(args.output_dir)), described)
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
    args: RunArguments,
    accelerator: Accelerator,
    model: torch.nn.Module,
    processor: Blip2xProcessor,
    train_set: CaptionDataset | JointDataset,
    eval_set: CaptionDataset | JointDataset | None,
    task: Task,
) -> None:
    """Train `model`, its frozen parts chosen already, and make the run's root a complete checkpoint."""
    output_dir, state = Path(args.output_dir), NOTHING_DONE
    if not args.overwrite_output_dir:
        state = read_state(output_dir)
    max_steps = max(steps_of(args, accelerator, train_set), state["step"])  # of fewer steps there is nothing to undo
    made_from = on_main(accelerator, lambda: describe_data(train_set, eval_set))
    model.check_processor(processor)
    model.config.interpolate_pos_encoding = has_other_size(model, processor)
    model.config.position_dropout, model.config.feature_dropout = args.position_dropout, args.feature_dropout
    model.config.qformer_config.word_dropout = args.word_dropout
    if args.lora:
        add_lora(model, args.lora)
    accelerator.print(model.trainable_parameters_summary())
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if args.torch_compile:
        model.compile()
    if args.feature_cache:
        splits = {args.train_split: train_set} | ({args.eval_split: eval_set} if eval_set else {})
        use_feature_cache(args.feature_cache, model, processor.image_processor, splits)
    if eval_set:
        leave_out_unreadable(accelerator, eval_set, args.eval_batch_size)

    made_from |= on_main(accelerator, lambda: describe_model(model, processor))
    check_origin(args, accelerator, state, made_from)
    # After the marks of the weights are taken: those are of the files, whatever dtype a run holds them in.
    hold_frozen(model, args.frozen_dtype, args.bf16, features_cached=bool(args.feature_cache))
    refuse_unscaled_float16(model, args.bf16, args.fp16)
    open_output_dir(args, accelerator)
    tell_what_is_cut(accelerator, train_set, task.collate, args.max_text_length)
    batches = batches_from_where_it_stopped(args, accelerator, train_set, eval_set, task, max_steps)
    schedule = Schedule(
        max_steps=max_steps,
        warmup_steps=warm_up(args.warmup_steps, max_steps, accelerator),
        peak=args.learning_rate,
        floor=args.min_learning_rate,
    )
    watch = Watch(args.warmup_steps, say=lambda text: accelerator.print(f"\n{text}"))
    best = Best(args.metric_for_best_model, args.best_is_greatest)
    seed_training(args.seed, accelerator)

    with workers_may_die(lambda: f"{intact(output_dir)} The same command continues from there."):
        averages = train(args, accelerator, model, batches, task, schedule, best, watch, made_from)
        with averages.in_place() if averages else contextlib.nullcontext():
            figures = validate(model, task, final=True)
            finish(args, accelerator, model, processor, max_steps, figures, best, watch, averaged=averages is not None)


def batches_from_where_it_stopped(
    args: RunArguments,
    accelerator: Accelerator,
    train_set: CaptionDataset | JointDataset,
    eval_set: CaptionDataset | JointDataset | None,
    task: Task,
    max_steps: int,
) -> Iterable[dict]:
    """This process's batches, from where an earlier run of the folder stopped to the last step."""
    state = read_state(Path(args.output_dir))
    record_skips(accelerator, Path(args.output_dir), args.max_skip_fraction, train_set, eval_set, state["samples_seen"])
    parts = train_set.parts
    visits = [
        visit_order(
            [len(part) for part in parts],
            [part.shards for part in parts],
            args.dataset_weights,
            args.seed,
            order_of(state),
        )
        for _ in range(2)  # one for each thread: it remembers where it is
    ]
    order = BatchOrder(
        visits[0],
        args.per_device_train_batch_size,
        (max_steps - state["step"]) * args.gradient_accumulation_steps,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        samples_seen=state["samples_seen"],
        prefetcher=start_prefetcher(train_set, visits[1], state["samples_seen"])
        if accelerator.is_local_main_process
        else None,
    )
    on_gpu = accelerator.device.type == "cuda"
    workers, timeout, device = args.dataloader_num_workers, args.dataloader_timeout, accelerator.device
    return make_loader(train_set, order, task.collate, workers, pin_memory=on_gpu, timeout=timeout, device=device)
