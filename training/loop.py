"""The training loop of both stages. What differs between them is the model and the collator.

A step is one optimiser step: `gradient_accumulation_steps` forwards of the global batch. Steps count from 1.
"""

import json
import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from checkpoint import load_step, read_state, save_root, save_step, trim_metrics
from optim import set_learning_rate
from tqdm import tqdm

MEASURED = (
    "loss",
    "loss_itc",
    "loss_itm",
    "loss_itg",
    "itm_accuracy",
    "temperature",
)  # of outputs, where they have them


def plain_step(accelerator: Accelerator, model: torch.nn.Module, inputs: dict):
    """One forward and its backward; the outputs."""
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
    forward_inputs: Callable[[int], dict] = lambda forward: {},
    forward_backward: Callable = plain_step,
) -> torch.nn.Module:
    """Train from the last whole checkpoint in `output_dir`, or from the start, to `max_steps`.

    Args:
        batches: this process's micro-batches from the resumed position on.
        learning_rate: learning rate of a step, counted from 0.
        validate: run every `eval_steps` on all processes; its figures join metrics.jsonl.
        forward_inputs: more arguments for the model, given the number of the forward.
        forward_backward: of (accelerator, model, inputs); leaves gradients, returns the outputs.

    Returns the model as accelerate prepared it. Raises FloatingPointError when a loss is not finite.
    """
    model, optimizer = accelerator.prepare(model, optimizer)
    state = read_state(output_dir)
    batches = iter(batches)
    if state["step"]:
        load_step(output_dir, state["step"], model, optimizer, accelerator)
        accelerator.print(f"Continuing {output_dir} after step {state['step']} of {max_steps}.")
    if accelerator.is_main_process:
        trim_metrics(output_dir / "metrics.jsonl", state["step"])
    meter, samples_seen = Meter(), state["samples_seen"]
    progress = tqdm(
        total=max_steps, initial=state["step"], disable=not accelerator.is_main_process, unit="step", mininterval=2
    )
    model.train()

    for step in range(state["step"] + 1, max_steps + 1):
        set_learning_rate(optimizer, learning_rate(step - 1))
        for micro in range(gradient_accumulation_steps):
            batch = send_to_device(next(batches), accelerator.device, non_blocking=True)
            with accelerator.accumulate(model):
                more = forward_inputs((step - 1) * gradient_accumulation_steps + micro)
                outputs = forward_backward(accelerator, model, {**batch, **more})
                stop_unless_finite(outputs, step, output_dir)
                if accelerator.sync_gradients and max_grad_norm:
                    meter.grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            size = len(next(iter(batch.values()))) * accelerator.num_processes
            samples_seen += size
            meter.add(outputs, size)

        progress.update()
        if step % logging_steps == 0 or step == max_steps:
            line = {"step": step, **meter.read(accelerator), "lr": learning_rate(step - 1)}
            log(accelerator, output_dir, line)
            progress.set_postfix({key: f"{line[key]:.3g}" for key in MEASURED if key in line})
        if (eval_steps and step % eval_steps == 0) and step < max_steps:
            log(accelerator, output_dir, {"step": step, **validate()})
            model.train()
            meter.restart_clock()
        if step % save_steps == 0 or step == max_steps:
            save_step(output_dir, step, samples_seen, model, optimizer, accelerator, save_total_limit)
    progress.close()
    return model


def stop_unless_finite(outputs, step: int, output_dir: Path) -> None:
    """Raise FloatingPointError naming the parts of the loss that are inf or NaN."""
    if torch.isfinite(outputs.loss):
        return
    values = {
        name: outputs[name].item() for name in MEASURED if name.startswith("loss") and outputs.get(name) is not None
    }
    broken = [name for name, value in values.items() if not torch.isfinite(torch.tensor(value))]
    parts = [name for name in broken if name != "loss"] or broken
    raise FloatingPointError(
        f"Step {step}: {', '.join(parts)} is not finite (losses: {values}). The last whole checkpoint under "
        f"{output_dir / 'checkpoints'} is intact. Try a lower --learning_rate, more --warmup_steps, or bf16 in place "
        "of fp16."
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
        if self.grad_norm is not None:
            means["grad_norm"] = float(self.grad_norm)
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
    """Append a line to metrics.jsonl and hand it to the trackers."""
    if accelerator.is_main_process:
        with open(output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    accelerator.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])


def loss_summary(metrics: Path, steps: int = 50) -> str:
    """Each loss: its mean over the first and over the last `steps` steps, as a table."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "lr" in line]  # training, not validation
    last = lines[-1]["step"]
    rows = [f"{'loss':<10}{'first ' + str(steps):>12}{'last ' + str(steps):>12}"]
    for name in (n for n in MEASURED if n.startswith("loss") and n in lines[0]):
        first = [line[name] for line in lines if line["step"] <= steps] or [lines[0][name]]
        final = [line[name] for line in lines if line["step"] > last - steps]
        rows.append(f"{name:<10}{sum(first) / len(first):>12.4f}{sum(final) / len(final):>12.4f}")
    return "\n".join(rows)


def finish(accelerator: Accelerator, output_dir: Path, max_steps: int, figures: dict, *parts) -> None:
    """Log the last validation, make the run's root a complete checkpoint of `parts`, and say how the losses went."""
    if figures:
        log(accelerator, output_dir, {"step": max_steps, **figures})
    if accelerator.is_main_process:
        save_root(output_dir, *parts)
        print(loss_summary(output_dir / "metrics.jsonl"))
        print("\n".join(f"{name:<32}{value:>9.4f}" for name, value in figures.items()))
        print(f"Finished. {output_dir} is a complete checkpoint: load it with from_pretrained.")
    accelerator.wait_for_everyone()
    if accelerator.trackers:
        accelerator.end_training()
