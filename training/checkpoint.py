"""Checkpoints to resume from, and the complete checkpoint at the root of a run.

A step's folder holds what training changes: trained tensors, optimiser, random states of each process, and the step
and number of samples seen, which fix learning rate and data position. Frozen towers are not saved again.
Everything is written beside its place and renamed into it, so a folder that is there is whole.
"""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file


def trained_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def random_states() -> dict:
    """States of python's, numpy's and torch's generators, as tensors and plain values."""
    version, internal, gauss = random.getstate()
    numpy_name, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [numpy_name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict) -> None:
    torch.set_rng_state(states["torch"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def steps_saved(output_dir: Path) -> list[int]:
    """Steps with a whole checkpoint, ascending."""
    folders = (output_dir / "checkpoints").glob("step_*")
    return sorted(int(folder.name.removeprefix("step_")) for folder in folders if folder.name[5:].isdigit())


def save_step(
    output_dir: Path,
    step: int,
    samples_seen: int,
    model: torch.nn.Module,
    optimizer,
    accelerator: Accelerator,
    save_total_limit: int | None,
) -> None:
    """Write checkpoints/step_N; all processes call this. Older ones beyond the limit are removed afterwards."""
    target = output_dir / "checkpoints" / f"step_{step}"
    temporary = target.with_name(f".{target.name}.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    torch.save(random_states(), temporary / f"random_states_{accelerator.process_index}.pt")
    if accelerator.is_main_process:
        save_file(
            {k: v.contiguous().cpu() for k, v in trained_tensors(accelerator.unwrap_model(model)).items()},
            temporary / "trained.safetensors",
        )
        torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
        if accelerator.scaler is not None:
            torch.save(accelerator.scaler.state_dict(), temporary / "scaler.pt")
        state = {"step": step, "samples_seen": samples_seen, "num_processes": accelerator.num_processes}
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        for old in steps_saved(output_dir)[: -save_total_limit if save_total_limit else 0]:
            shutil.rmtree(output_dir / "checkpoints" / f"step_{old}")
    accelerator.wait_for_everyone()


def read_state(output_dir: Path) -> dict:
    """`step` and `samples_seen` of the last whole checkpoint; zeros if there is none."""
    steps = steps_saved(output_dir)
    if not steps:
        return {"step": 0, "samples_seen": 0}
    return read_checked(output_dir, steps[-1], "state.json", lambda path: json.loads(path.read_text(encoding="utf-8")))


def load_step(output_dir: Path, step: int, model: torch.nn.Module, optimizer, accelerator: Accelerator) -> None:
    """Restore what `save_step` wrote. Random states are those of this process, where it had any."""
    tensors = read_checked(output_dir, step, "trained.safetensors", load_file)
    wanted = trained_tensors(accelerator.unwrap_model(model))
    missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    shapes = [
        f"{k}: {tuple(tensors[k].shape)} saved, {tuple(wanted[k].shape)} now"
        for k in wanted.keys() & tensors.keys()
        if tensors[k].shape != wanted[k].shape
    ]
    if missing or unknown or shapes:
        raise ValueError(
            f"{output_dir}/checkpoints/step_{step} belongs to another model (missing: {missing[:3]}, unknown: "
            f"{unknown[:3]}, shapes: {shapes[:3]}). Use the fields of its config.yaml, another --output_dir, or "
            "--overwrite_output_dir to start over."
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            wanted[name].copy_(tensor)

    def load(path: Path):
        return torch.load(path, map_location="cpu", weights_only=True)

    optimizer.load_state_dict(read_checked(output_dir, step, "optimizer.pt", load))
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(read_checked(output_dir, step, "scaler.pt", load))
    own = f"random_states_{accelerator.process_index}.pt"
    if (output_dir / "checkpoints" / f"step_{step}" / own).exists():  # not when resuming on more processes
        set_random_states(read_checked(output_dir, step, own, load))


def read_checked(output_dir: Path, step: int, name: str, read):
    """`read` a checkpoint's file; damage becomes a ValueError that names the file and the way out."""
    path = output_dir / "checkpoints" / f"step_{step}" / name
    try:
        return read(path)
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(
            f"{path} is missing or damaged ({type(error).__name__}: {error}). Delete the folder step_{step} to "
            "continue from the checkpoint before it, or pass --overwrite_output_dir to start over."
        ) from error


def is_finished(output_dir: Path, max_steps: int) -> bool:
    """True when the run has its last step and its root checkpoint."""
    return (output_dir / "config.json").exists() and read_state(output_dir)["step"] >= max_steps


def clear_output_dir(output_dir: Path) -> None:
    """Remove what an earlier run wrote, and nothing else."""
    shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)
    for name in ("metrics.jsonl", "config.yaml", "config.json"):
        (output_dir / name).unlink(missing_ok=True)


def save_root(output_dir: Path, *parts) -> None:
    """Write model and processor (anything with save_pretrained) to the run's root, config.json last."""
    temporary = output_dir / ".root.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    for part in parts:
        part.save_pretrained(temporary)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
        target = output_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    temporary.rmdir()


def trim_metrics(path: Path, step: int) -> None:
    """Drop metric lines after `step`, which a resumed run will write again, and a line cut off by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
