"""The training loop of both stages. What differs between them is the model and the collator.

A step is one optimiser step: `gradient_accumulation_steps` forwards of the global batch. Steps count from 1.
"""

import contextlib
import json
import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from best import Best, write_best
from checkpoint import clear_leftovers, keep_newest, load_step, read_state, save_step, trim_metrics
from curves import draw_curves
from optim import AveragedWeights, set_learning_rate
from sharding import keep_embeddings_whole, plan_sharding
from tqdm import tqdm
from watch import Watch

from blip2x_training.models.full_tensors import free_gathered, whole
from blip2x_training.system.signals import StopSignal

MEASURED = (
    "loss",
    "loss_itc",
    "loss_itm",
    "loss_itg",
    "itm_accuracy",
    "temperature",
)  # of outputs, where they have them
SHOWN = {"loss": "loss", "loss_itc": "itc", "loss_itm": "itm", "loss_itg": "itg", "lr": "lr"}  # in the progress bar
SHOWN["samples_per_second"] = "images/s"


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


def losses_of(outputs) -> dict[str, torch.Tensor]:
    """The total and its parts, as scalars without gradient."""
    names = [name for name in MEASURED if name.startswith("loss") and outputs.get(name) is not None]
    return {name: outputs[name].detach().float() for name in names}


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


class Meter:
    """Means over the forwards since the last read, throughput and memory."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.forwards, self.samples, self.start, self.grad_norm = 0, 0, time.perf_counter(), None

    def add(self, outputs, samples: int) -> None:
        for name in MEASURED:
            if outputs.get(name) is not None:
                self.sums[name] = self.sums.get(name, 0.0) + outputs[name].detach().float().mean()
        self.forwards += 1
        self.samples += samples

    def read(self, accelerator: Accelerator) -> dict:
        """Means over forwards and processes; starts the next window."""
        means = {k: accelerator.reduce(v / self.forwards, "mean").item() for k, v in self.sums.items()}
        if self.grad_norm is not None and torch.isfinite(norm := whole(torch.as_tensor(self.grad_norm))):
            means["grad_norm"] = float(norm)  # inf: float16's scaler has skipped the step
        means["samples_per_second"] = round(self.samples / (time.perf_counter() - self.start), 2)
        means["peak_memory_mb"] = peak_memory_mb()
        self.__init__()
        return means

    def restart_clock(self) -> None:
        """Leave what was not training out of the throughput."""
        self.start = time.perf_counter() if not self.forwards else self.start


def peak_memory_mb() -> float:
    """Highest memory so far in MB: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)


def log(accelerator: Accelerator, output_dir: Path, line: dict) -> None:
    """Append a line to metrics.jsonl and hand it to the trackers; a validation also draws curves.png anew."""
    if accelerator.is_main_process:
        with open(output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if "lr" not in line:
            draw_curves(output_dir / "metrics.jsonl", output_dir / "curves.png")
    accelerator.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])


def close_trackers(accelerator: Accelerator) -> None:
    """Let trackers write what they hold; the process group stays, unlike after accelerate's end_training."""
    for tracker in accelerator.trackers:
        tracker.finish()
