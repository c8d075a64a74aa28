"""What a run measures between two lines of its log, and where the lines go."""

import json
import resource
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from ..models.full_tensors import whole
from .curves import draw_curves


def measured(outputs) -> dict[str, torch.Tensor]:
    """The scalars of a model's output, whatever it names them: losses, accuracies, temperature. Without gradient."""
    scalars = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor) and value.ndim == 0}
    return {name: value.detach().float() for name, value in scalars.items()}


def losses_of(outputs) -> dict[str, torch.Tensor]:
    """The total and its parts, as scalars without gradient."""
    return {name: value for name, value in measured(outputs).items() if name.startswith("loss")}


def shown(line: dict) -> dict[str, str]:
    """What the progress bar shows of a line of training: losses, learning rate and speed."""
    losses = {name.removeprefix("loss_"): value for name, value in line.items() if name.startswith("loss")}
    figures = losses | {"lr": line["lr"], "images/s": line["samples_per_second"]}
    return {name: f"{value:.3g}" for name, value in figures.items()}


class Meter:
    """Means over the forwards since the last read, throughput and memory."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.forwards, self.samples, self.start, self.grad_norm = 0, 0, time.perf_counter(), None

    def add(self, outputs, samples: int) -> int:
        """Count a forward; returns its samples."""
        for name, value in measured(outputs).items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.forwards += 1
        self.samples += samples
        return samples

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
        """Start timing anew unless a forward has been counted: what came before, as a validation, was no training."""
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
