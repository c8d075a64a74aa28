"""The training loop of every stage. What differs between kinds of training is their `Task`.

A step is one optimiser step: `gradient_accumulation_steps` forwards of the global batch. Steps count from 1.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from tqdm import tqdm

from ..arguments.training import RunArguments
from ..models.full_tensors import free_gathered
from ..reporting.health import Watch, query_similarity
from ..reporting.meter import Meter, close_trackers, log, losses_of, shown
from ..system.signals import StopSignal
from .best import Best, write_best
from .checkpoint import clear_leftovers, keep_newest, load_step, order_of, read_state, save_step, trim_metrics
from .finite import agree, clip_gradients, gradient_norm, not_finite
from .optimizer import AveragedWeights, Schedule, build_optimizer, set_learning_rate
from .sharding import keep_embeddings_whole, plan_sharding
from .token_weights import tokens_per_forward


def plain_step(accelerator: Accelerator, model: torch.nn.Module, inputs: dict):
    """One forward and its backward; the outputs."""
    with accelerator.autocast():
        outputs = model(**inputs)
    accelerator.backward(outputs.loss)
    return outputs


@dataclass
class Task:
    """What one kind of training brings.

    collate: dataset items to a training batch, named as the model's arguments.
    count_tokens: of a batch, those that the model's loss on texts is a mean over.
    validate: figures of the model as it is, on all processes; its argument says whether it is the last time.
    inputs_of: more arguments for the model, given the number of the forward.
    step: of (accelerator, model, inputs); leaves gradients, returns the outputs.
    """

    collate: Callable[[list[dict]], dict]
    count_tokens: Callable[[dict], torch.Tensor]
    validate: Callable[[bool], dict]
    inputs_of: Callable[[int], dict] = lambda forward: {}
    step: Callable = plain_step


def train(
    args: RunArguments,
    accelerator: Accelerator,
    model: torch.nn.Module,
    batches: Iterable[dict],
    task: Task,
    schedule: Schedule,
    best: Best,
    watch: Watch,
    made_from: dict,
) -> AveragedWeights | None:
    """Train from the last whole checkpoint in `args.output_dir`, or from the start, to the schedule's last step.

    A checkpoint is written every `save_steps`, where a validation is the best so far, at the end, and before a signal
    ends the run.

    Args:
        batches: this process's micro-batches from the resumed position on.
        best: judges the validations. watch: warns of what it sees in the figures.
        made_from: kept in each checkpoint, for a run that continues from it.

    Returns the averaged weights, if any. Raises FloatingPointError when a loss or a gradient is not finite, on any process,
    and SystemExit(128 + signal) after Ctrl-C, SIGTERM or SIGUSR1.
    """
    output_dir, max_steps, forwards = Path(args.output_dir), schedule.max_steps, args.gradient_accumulation_steps
    optimizer = build_optimizer(
        model,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        layer_decay=args.layer_decay,
        pretrained=args.pretrained,
        pretrained_scale=args.pretrained_lr_scale,
    )
    plan_sharding(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    keep_embeddings_whole(accelerator.unwrap_model(model))
    averages = AveragedWeights(accelerator.unwrap_model(model), args.ema_decay) if args.ema_decay else None
    state = resume(output_dir, model, optimizer, accelerator, averages, best, max_steps)
    meter, samples_seen, order, batches = Meter(), state["samples_seen"], order_of(state), iter(batches)
    progress = tqdm(
        total=max_steps, initial=state["step"], disable=not accelerator.is_main_process, unit="step", mininterval=2
    )
    model.train()

    with StopSignal(accelerator.is_main_process) as stop:
        for step in range(state["step"] + 1, max_steps + 1):
            rate, is_logged = schedule.rate_at(step - 1), step % args.logging_steps == 0 or step == max_steps
            set_learning_rate(optimizer, rate)
            micro_batches, losses = [next(batches) for _ in range(forwards)], []
            tokens = tokens_per_forward(accelerator, micro_batches, task.count_tokens)
            for micro, batch in enumerate(micro_batches):
                batch = send_to_device(batch, accelerator.device, non_blocking=True)
                inputs = batch | task.inputs_of((step - 1) * forwards + micro) | {"num_items_in_batch": tokens}
                with accelerator.accumulate(model):
                    with query_similarity(accelerator.unwrap_model(model), active=is_logged) as similarity:
                        outputs = task.step(accelerator, model, inputs)
                    losses.append(losses_of(outputs))
                    if accelerator.sync_gradients:
                        meter.grad_norm = gradient_norm(accelerator, model)
                        broken, signal_number = agree(accelerator, losses, meter.grad_norm, stop.number)
                        if broken:
                            raise not_finite(accelerator, model, broken, losses, step, output_dir)
                        clip_gradients(model, args.max_grad_norm, meter.grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                samples_seen += meter.add(outputs, len(next(iter(batch.values()))) * accelerator.num_processes)
            if averages is not None:
                averages.update()

            progress.update()
            if is_logged:
                line = {"step": step, **meter.read(accelerator), **similarity, "lr": rate}
                log(accelerator, output_dir, line)
                watch.look(line)
                progress.set_postfix(shown(line))
            improved = False
            if args.eval_steps and step % args.eval_steps == 0 and step < max_steps and not signal_number:
                with averages.in_place() if averages else contextlib.nullcontext():
                    figures = validate(accelerator.unwrap_model(model), task)
                    free_gathered(accelerator.unwrap_model(model))  # validated weights stay gathered otherwise
                log(accelerator, output_dir, {"step": step, **figures})
                watch.look({"step": step, **figures})
                improved = best.update(step, figures)
                model.train()
                meter.restart_clock()
            if step % args.save_steps == 0 or step == max_steps or improved or signal_number:
                state = {"step": step, "samples_seen": samples_seen, "num_processes": accelerator.num_processes}
                state |= {"order": order, "best": best.record(), "made_from": made_from}
                save_step(output_dir, state, model, optimizer, accelerator, averages)
                if accelerator.is_main_process:
                    write_best(output_dir, best)
                    keep_newest(output_dir, args.save_total_limit, best.step)
            if signal_number and step < max_steps:
                accelerator.print(f"Stopped after step {step} of {max_steps}, saved. The same command continues.")
                close_trackers(accelerator)
                raise SystemExit(128 + signal_number)
    progress.close()
    return averages


def resume(
    output_dir: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    averages: AveragedWeights | None,
    best: Best,
    max_steps: int,
) -> dict:
    """State of the last whole checkpoint, restored; what a killed run wrote after it is removed."""
    state = read_state(output_dir)
    if state["step"]:
        load_step(output_dir, state["step"], model, optimizer, accelerator, averages)
        best.resume(state.get("best"))
        accelerator.print(f"Continuing {output_dir} after step {state['step']} of {max_steps}.")
    if accelerator.is_main_process:
        clear_leftovers(output_dir)
        if dropped := trim_metrics(output_dir / "metrics.jsonl", state["step"], max_steps):
            accelerator.print(dropped)
    return state


def validate(model: torch.nn.Module, task: Task, final: bool = False) -> dict[str, float]:
    """Figures of a validation, and how alike the queries are in its first batch; none where there is no validation."""
    with query_similarity(model) as similarity:
        figures = task.validate(final)
    return figures | similarity if figures else {}
