"""The end of a run: which weights the root of its folder gets, and what is printed."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator

from ..models.full_tensors import unshard_for_saving
from ..reporting.curves import draw_curves
from ..reporting.health import Watch
from ..reporting.meter import MEASURED, close_trackers, log
from ..system.atomic_files import write_whole
from .best import Best, write_best
from .checkpoint import keep_newest, load_best, read_state, save_root, step_folder


def finish(
    accelerator: Accelerator,
    model: torch.nn.Module,
    parts: list,
    *,
    output_dir: Path,
    max_steps: int,
    figures: dict[str, float],
    best: Best,
    watch: Watch,
    save_total_limit: int | None,
    load_best_model: bool,
    averaged: bool,
) -> None:
    """Log the last validation, make the run's root a complete checkpoint, and say how the losses went.

    Args:
        model: as it is to be saved; sharded, it cannot be used any more afterwards.
        parts: what has save_pretrained and goes into the root: the model, or what saves it, and the processor.
        load_best_model: the root gets the weights of the best validation instead of the last step's.
        averaged: weights are averages over steps.
    """
    if figures:
        log(accelerator, output_dir, {"step": max_steps, **figures})
        watch.look({"step": max_steps, **figures})
    if best.update(max_steps, figures) and accelerator.is_main_process:
        state = read_state(output_dir) | {"best": best.record()}
        write_whole(step_folder(output_dir, max_steps) / "state.json", json.dumps(state))
    step = best.step if load_best_model and best.step else max_steps
    if step != max_steps:
        load_best(output_dir, step, model, averaged)
    unshard_for_saving(model, keep=accelerator.is_main_process)
    if accelerator.is_main_process:
        write_best(output_dir, best)
        keep_newest(output_dir, save_total_limit, best.step)
        save_root(output_dir, *parts)
        draw_curves(output_dir / "metrics.jsonl", output_dir / "curves.png")
        print(loss_summary(output_dir / "metrics.jsonl"))
        print("\n".join(f"{name:<32}{value:>9.4f}" for name, value in figures.items()))
        if best.step:
            print(f"Best {best.metric}: {best.value:.4f} after step {best.step}, kept in checkpoints/step_{best.step}.")
        print(f"Finished. {output_dir} is a complete checkpoint (step {step}): load it with from_pretrained.")
    accelerator.wait_for_everyone()
    close_trackers(accelerator)


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
