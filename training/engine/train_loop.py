"""The training loop of both stages. What differs between them is the model and the collator.

A step is one optimiser step: `gradient_accumulation_steps` forwards of the global batch. Steps count from 1.
"""

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from tqdm import tqdm

from ..models.full_tensors import free_gathered
from ..reporting.health import Watch
from ..reporting.meter import SHOWN, Meter, close_trackers, log, losses_of
from ..system.signals import StopSignal
from .best import Best, write_best
from .checkpoint import clear_leftovers, keep_newest, load_step, read_state, save_step, trim_metrics
from .optimizer import AveragedWeights, set_learning_rate
from .sharding import keep_embeddings_whole, plan_sharding


def plain_step(accelerator: Accelerator, model: torch.nn.Module, inputs: dict):
    """One forward and its backward; the outputs."""
    with accelerator.autocast():
        outputs = model(**inputs)
    accelerator.backward(outputs.loss)
    return outputs


def train(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[dict],
    *,
    output_dir: Path,
    max_steps: int,
    gradient_accumulation_steps: int,
    max_grad_norm: float,
    learning_rate: Callable[[int], float],
    logging_steps: int,
    save_steps: int,
    save_total_limit: int | None,
    eval_steps: int | None,
    validate: Callable[[], dict],
    best: Best,
    watch: Watch,
    ema_decay: float | None = None,
    forward_inputs: Callable[[int], dict] = lambda forward: {},
    forward_backward: Callable = plain_step,
) -> AveragedWeights | None:
    """Train from the last whole checkpoint in `output_dir`, or from the start, to `max_steps`.

    A checkpoint is written every `save_steps`, where a validation is the best so far, at the end, and before a signal
    ends the run.

    Args:
        batches: this process's micro-batches from the resumed position on.
        learning_rate: learning rate of a step, counted from 0.
        validate: run every `eval_steps` on all processes; its figures join metrics.jsonl.
        best: judges the validations. watch: warns of what it sees in the figures.
        ema_decay: decay of the average of the weights that is validated; None for none.
        forward_inputs: more arguments for the model, given the number of the forward.
        forward_backward: of (accelerator, model, inputs); leaves gradients, returns the outputs.

    Returns the averaged weights, if any. Raises FloatingPointError when a loss is not finite, on any process, and
    SystemExit(128 + signal) after Ctrl-C or SIGTERM.
    """
    plan_sharding(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    keep_embeddings_whole(accelerator.unwrap_model(model))
    averages = AveragedWeights(accelerator.unwrap_model(model), ema_decay) if ema_decay else None
    state = read_state(output_dir)
    batches = iter(batches)
    if state["step"]:
        load_step(output_dir, state["step"], model, optimizer, accelerator, averages)
        best.resume(state.get("best"))
        accelerator.print(f"Continuing {output_dir} after step {state['step']} of {max_steps}.")
    if accelerator.is_main_process:
        clear_leftovers(output_dir)
        trim_metrics(output_dir / "metrics.jsonl", state["step"], max_steps)
    meter, samples_seen = Meter(), state["samples_seen"]
    progress = tqdm(
        total=max_steps, initial=state["step"], disable=not accelerator.is_main_process, unit="step", mininterval=2
    )
    model.train()

    with StopSignal(accelerator.is_main_process) as stop:
        for step in range(state["step"] + 1, max_steps + 1):
            set_learning_rate(optimizer, learning_rate(step - 1))
            losses = []
            for micro in range(gradient_accumulation_steps):
                batch = send_to_device(next(batches), accelerator.device, non_blocking=True)
                with accelerator.accumulate(model):
                    more = forward_inputs((step - 1) * gradient_accumulation_steps + micro)
                    outputs = forward_backward(accelerator, model, {**batch, **more})
                    losses.append(losses_of(outputs))
                    if accelerator.sync_gradients:
                        broken, signal_number = agree(accelerator, losses, stop.number)
                        if broken:
                            raise not_finite(broken, losses, step, output_dir)
                        if max_grad_norm:
                            meter.grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                size = len(next(iter(batch.values()))) * accelerator.num_processes
                samples_seen += size
                meter.add(outputs, size)
            if averages is not None:
                averages.update()

            progress.update()
            if step % logging_steps == 0 or step == max_steps:
                line = {"step": step, **meter.read(accelerator), "lr": learning_rate(step - 1)}
                log(accelerator, output_dir, line)
                watch.look(line)
                progress.set_postfix({SHOWN[key]: f"{line[key]:.3g}" for key in SHOWN if key in line})
            improved = False
            if eval_steps and step % eval_steps == 0 and step < max_steps and not signal_number:
                with averages.in_place() if averages else contextlib.nullcontext():
                    figures = validate()
                    free_gathered(accelerator.unwrap_model(model))  # validated weights stay gathered otherwise
                log(accelerator, output_dir, {"step": step, **figures})
                watch.look({"step": step, **figures})
                improved = best.update(step, figures)
                model.train()
                meter.restart_clock()
            if step % save_steps == 0 or step == max_steps or improved or signal_number:
                state = {"step": step, "samples_seen": samples_seen, "num_processes": accelerator.num_processes}
                state["best"] = best.record()
                save_step(output_dir, state, model, optimizer, accelerator, averages)
                if accelerator.is_main_process:
                    write_best(output_dir, best)
                    keep_newest(output_dir, save_total_limit, best.step)
            if signal_number and step < max_steps:
                accelerator.print(f"Stopped after step {step} of {max_steps}, saved. The same command continues.")
                close_trackers(accelerator)
                raise SystemExit(128 + signal_number)
    progress.close()
    return averages


def agree(accelerator: Accelerator, losses: list[dict], signal_number: int) -> tuple[list[str], int]:
    """Losses that are not finite on some process, and the signal that some process got; the same on all.

    One exchange of a few integers a step, so that processes stop together and none waits for one that has gone.
    """
    finite = torch.stack([torch.stack([torch.isfinite(forward[n]) for forward in losses]).all() for n in losses[0]])
    flags = torch.cat([~finite, finite.new_zeros(1)]).to(torch.int32)
    flags[-1] = signal_number
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    *broken, signal_number = flags.tolist()
    return [name for name, is_broken in zip(losses[0], broken) if is_broken], signal_number


def not_finite(broken: list[str], losses: list[dict], step: int, output_dir: Path) -> FloatingPointError:
    """The error that names the parts of the loss that are inf or NaN."""
    parts = [name for name in broken if name != "loss"] or broken
    values = "; ".join(str({name: value.item() for name, value in forward.items()}) for forward in losses)
    return FloatingPointError(
        f"Step {step}: {', '.join(parts)} is not finite (losses of this process: {values}). The last whole checkpoint "
        f"under {output_dir / 'checkpoints'} is intact. Try a lower --learning_rate, more --warmup_steps, or bf16 in "
        "place of fp16."
    )
