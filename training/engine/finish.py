"""The end of a run: which weights the root of its folder gets, and what is printed."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator

from modeling_blip2x import Blip2xProcessor

from ..arguments.training import RunArguments
from ..models.full_tensors import unshard_for_saving
from ..models.lora import LoraCheckpoint
from ..reporting.curves import draw_curves
from ..reporting.health import Watch
from ..reporting.meter import close_trackers, log
from .best import Best, write_best
from .checkpoint import keep_newest, load_best, mark_finished, read_state, save_root, write_state


def finish(
    args: RunArguments,
    accelerator: Accelerator,
    model: torch.nn.Module,
    processor: Blip2xProcessor,
    max_steps: int,
    figures: dict[str, float],
    best: Best,
    watch: Watch,
    averaged: bool,
) -> None:
    """Log the last validation, make the run's root a complete checkpoint, and say how the losses went.

    Args:
        model: as it is to be saved; sharded, it cannot be used any more afterwards.
        figures: of the last validation; {} where there is none.
        averaged: weights are averages over steps.
    """
    output_dir = Path(args.output_dir)
    if figures:
        log(accelerator, output_dir, {"step": max_steps, **figures})
        watch.look({"step": max_steps, **figures})
    if best.update(max_steps, figures) and accelerator.is_main_process:
        write_state(output_dir, read_state(output_dir) | {"best": best.record()})
    step = best.step if args.load_best_model_at_end and best.step else max_steps
    if step != max_steps:
        load_best(output_dir, step, model, averaged)
    unshard_for_saving(model, keep=accelerator.is_main_process)
    if accelerator.is_main_process:
        write_best(output_dir, best)
        keep_newest(output_dir, args.save_total_limit, best.step)
        saved = LoraCheckpoint(model, processor if args.merge_lora else None) if args.lora else model
        save_root(output_dir, saved, processor)
        draw_curves(output_dir / "metrics.jsonl", output_dir / "curves.png")
        mark_finished(output_dir, max_steps, step)  # last: a run killed before this line finishes when it is repeated
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
    if not lines:
        return f"{metrics} has no lines of training: they were lost."
    last = lines[-1]["step"]
    rows = [f"{'loss':<10}{'first ' + str(steps):>12}{'last ' + str(steps):>12}"]
    for name in (name for name in lines[0] if name.startswith("loss")):
        first = [line[name] for line in lines if line["step"] <= steps] or [lines[0][name]]
        final = [line[name] for line in lines if line["step"] > last - steps]
        rows.append(f"{name:<10}{sum(first) / len(first):>12.4f}{sum(final) / len(final):>12.4f}")
    return "\n".join(rows)
