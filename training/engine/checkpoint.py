"""Checkpoints to resume from, and the complete checkpoint at the root of a run.

A step's folder holds what training changes: trained tensors, optimiser, random states of each process, and the step
and number of samples seen, which fix learning rate and data position. Frozen towers are not saved again. Tensors are
saved by name and in full (`gather`), so a run continues on any number of processes, sharded or not. Every folder
appears whole or not at all (system/atomic_files.py), and state.json has the checksums of all files, itself included.
"""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from safetensors.torch import load_file, save_file

from ..data.order import VERSION
from ..models.full_tensors import (
    optimizer_tensors,
    put_optimizer_tensors,
    put_tensors,
    trained_parameters,
    whole_tensors,
)
from ..system.atomic_files import clear_unfinished, discard, even_modes, sync, whole_folder, write_whole
from ..system.checksums import file_sum, read_sealed, write_sealed
from .best import check_best
from .optimizer import AveragedWeights

NOTHING_DONE = {"step": 0, "samples_seen": 0}


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


def step_folder(output_dir: Path, step: int) -> Path:
    return output_dir / "checkpoints" / f"step_{step}"


def steps_saved(output_dir: Path) -> list[int]:
    """Steps with a whole checkpoint, ascending."""
    folders = (output_dir / "checkpoints").glob("step_*")
    return sorted(int(folder.name.removeprefix("step_")) for folder in folders if folder.name[5:].isdigit())


def order_of(state: dict) -> int:
    """Version of the order in which a run visits rows: that of its checkpoints, of which the first ones name none."""
    return state.get("order", 1 if state["step"] else VERSION)


def save_step(
    output_dir: Path,
    state: dict,
    model: torch.nn.Module,
    optimizer,
    accelerator: Accelerator,
    averages: AveragedWeights | None = None,
) -> None:
    """Write checkpoints/step_N, N being state["step"]; all processes call this.

    Raises OSError, with the earlier checkpoints as they were, when it cannot be written.
    """
    target, keep = step_folder(output_dir, state["step"]), accelerator.is_main_process
    parameters = trained_parameters(accelerator.unwrap_model(model))
    tensors = whole_tensors(parameters, keep)
    sharded_by_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if sharded_by_deepspeed:  # first: what has no step folder beside it is never read
        model.save_checkpoint(str(output_dir / "checkpoints" / "deepspeed"), tag=target.name)
    files = {
        "optimizer.pt": {} if sharded_by_deepspeed else optimizer_tensors(parameters, optimizer, keep),
        "random_states.pt": gather_object([random_states()]),
    }
    if averages is not None:
        files["averages.pt"] = {"updates": averages.updates, "averages": whole_tensors(averages.averages, keep)}
    if accelerator.scaler is not None:
        files["scaler.pt"] = accelerator.scaler.state_dict()
    if keep:
        try:
            with whole_folder(target) as folder:
                save_file(tensors, folder / "trained.safetensors")
                for name, content in files.items():
                    torch.save(content, folder / name)
                sums = {path.name: file_sum(path) for path in sorted(folder.iterdir())}
                write_sealed(folder / "state.json", state | {"files": sums})
        except Exception as error:  # a full disk is an OSError, a RuntimeError or a SafetensorError, by the writer
            raise OSError(
                f"The checkpoint of step {state['step']} could not be written to {target.parent} "
                f"({type(error).__name__}: {error}). {intact(output_dir)} Free some space and give the same command again."
            ) from error
    accelerator.wait_for_everyone()


def intact(output_dir: Path) -> str:
    steps = steps_saved(output_dir)
    return f"The one of step {steps[-1]} is intact." if steps else "There is none before it."


def keep_newest(output_dir: Path, limit: int | None, best_step: int) -> None:
    """Remove all but the `limit` newest checkpoints and that of `best_step`; None keeps all."""
    for step in steps_saved(output_dir)[: -limit if limit else 0]:
        if step != best_step:
            discard(step_folder(output_dir, step))
            shutil.rmtree(output_dir / "checkpoints" / "deepspeed" / f"step_{step}", ignore_errors=True)


def read_state(output_dir: Path) -> dict:
    """`step` and `samples_seen` of the last whole checkpoint; zeros if there is none."""
    steps = steps_saved(output_dir)
    if not steps:
        return NOTHING_DONE
    return read_checked(output_dir, steps[-1], "state.json", read_step_state)


def read_step_state(path: Path) -> dict:
    state = read_sealed(path, always_with="files")
    counts = [state.get(name) for name in ("step", "samples_seen")]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"its step and samples_seen are {counts}")
    if path.parent.name != f"step_{state['step']}":
        raise ValueError(f"it is of step {state['step']}")
    for name, kinds in (("made_from", dict), ("files", dict), ("order", int)):
        if not isinstance(state.get(name), kinds | None):
            raise ValueError(f"its {name} is {state[name]!r}")
    check_best(state.get("best"))
    return state


def write_state(output_dir: Path, state: dict) -> None:
    """Replace what the checkpoint of step state["step"] says of itself."""
    write_sealed(step_folder(output_dir, state["step"]) / "state.json", state)


def load_step(
    output_dir: Path,
    step: int,
    model: torch.nn.Module,
    optimizer,
    accelerator: Accelerator,
    averages: AveragedWeights | None = None,
) -> None:
    """Restore what `save_step` wrote. Random states are those of this process, where it had any."""
    load_trained(output_dir, step, accelerator.unwrap_model(model))
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        model.load_checkpoint(str(output_dir / "checkpoints" / "deepspeed"), tag=f"step_{step}")
    else:
        parameters = trained_parameters(accelerator.unwrap_model(model))
        read_checked(
            output_dir, step, "optimizer.pt", lambda path: put_optimizer_tensors(load(path), parameters, optimizer)
        )
    if averages is not None:
        read_checked(output_dir, step, "averages.pt", lambda path: put_averages(load(path), averages))
    if accelerator.scaler is not None:
        read_checked(output_dir, step, "scaler.pt", lambda path: accelerator.scaler.load_state_dict(load(path)))
    index = accelerator.process_index
    read_checked(output_dir, step, "random_states.pt", lambda path: put_random_states(load(path), index))


def put_averages(saved: dict, averages: AveragedWeights) -> None:
    averages.updates = saved["updates"]
    put_tensors(saved["averages"], averages.averages)


def put_random_states(states: list[dict], process_index: int) -> None:
    if process_index < len(states):  # not when resuming on more processes
        set_random_states(states[process_index])


def load_trained(output_dir: Path, step: int, model: torch.nn.Module) -> None:
    """Put the trained tensors of a checkpoint into the model. Raises ValueError if they are another model's."""
    tensors = read_checked(output_dir, step, "trained.safetensors", load_file)
    wanted = trained_parameters(model)
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
    put_tensors(tensors, wanted)


def load_best(output_dir: Path, step: int, model: torch.nn.Module, averaged: bool) -> None:
    """Put the weights that were validated at a step into the model: the trained ones, or their averages."""
    if averaged:
        put_tensors(read_checked(output_dir, step, "averages.pt", load)["averages"], trained_parameters(model))
    else:
        load_trained(output_dir, step, model)


def load(path: Path):
    return torch.load(path, map_location="cpu", weights_only=True)


def read_checked(output_dir: Path, step: int, name: str, read):
    """`read` a checkpoint's file, if it is what was written; damage becomes a ValueError that names the file and the way
    out."""
    folder = step_folder(output_dir, step)
    try:
        if name != "state.json":
            wanted = read_step_state(folder / "state.json").get("files", {}).get(name)
            if wanted is not None and file_sum(folder / name) != wanted:
                raise ValueError("its bytes are not those that were written, by their checksum")
        return read(folder / name)
    except Exception as error:  # a damaged file can fail in any way
        before = [one for one in steps_saved(output_dir) if one < step]
        continues = f"Delete the folder step_{step} to continue from step {before[-1]}, or pass" if before else "Pass"
        raise ValueError(
            f"{folder / name} is missing or damaged ({type(error).__name__}: {error}). {continues} --overwrite_output_dir "
            "to start over."
        ) from error


def is_finished(output_dir: Path, max_steps: int) -> bool:
    """True when root and curves are those of the last step: `mark_finished` says so, after both."""
    try:
        steps = read_sealed(output_dir / "finished.json", always_with="sealed")["steps"]
        return (output_dir / "config.json").exists() and steps >= max_steps
    except (OSError, ValueError, TypeError, KeyError):  # not there or damaged: the end of the run is done again
        return False


def mark_finished(output_dir: Path, steps: int, weights_of_step: int) -> None:
    """finished.json: how many steps the run took, and of which step the root's weights are."""
    content = {"steps": steps, "weights_of_step": weights_of_step, "sealed": True}
    write_sealed(output_dir / "finished.json", content)


def clear_output_dir(output_dir: Path) -> None:
    """Remove what an earlier run wrote, and nothing else."""
    shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)
    shutil.rmtree(output_dir / "tensorboard", ignore_errors=True)
    for name in (
        "metrics.jsonl",
        "config.yaml",
        "config.json",
        "best.json",
        "curves.png",
        "environment.json",
        "finished.json",
        "skipped.jsonl",
        "tracker.json",
    ):
        (output_dir / name).unlink(missing_ok=True)


def save_root(output_dir: Path, *parts) -> None:
    """Write model and processor (anything with save_pretrained) to the run's root, config.json last.

    Raises OSError, with the root as it was, when they cannot be written.
    """
    temporary = output_dir / ".root.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for part in parts:
            part.save_pretrained(temporary)
        even_modes(temporary)
        for path in temporary.rglob("*"):
            sync(path)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"The checkpoint could not be written to {output_dir} ({type(error).__name__}: {error}). "
            f"{intact(output_dir)} Free some space and give the same command again."
        ) from error
    (output_dir / "finished.json").unlink(missing_ok=True)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
        target = output_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    temporary.rmdir()
    sync(output_dir)


def clear_leftovers(output_dir: Path) -> None:
    """Remove what a run that was killed left half written."""
    clear_unfinished(output_dir)
    clear_unfinished(output_dir / "checkpoints")


def trim_metrics(path: Path, step: int, max_steps: int) -> str | None:
    """Drop metric lines that a run resumed after `step` writes again, and what is no line of metrics; says so if it is
    more than a last line cut off by a crash.

    The validation of the last step, which has no learning rate in its line, comes after the last checkpoint.
    """
    if not path.exists():
        return None
    kept, damaged = [], []
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if not all(isinstance(value, (int, float)) for value in line.values()):
                raise ValueError("what is measured is a number")
            again = line["step"] > step or (line["step"] >= max_steps and "lr" not in line)
        except (ValueError, TypeError, KeyError, AttributeError):
            damaged += [number] if text else []
            continue
        if not again:
            kept.append(text + "\n")
    write_whole(path, "".join(kept))
    if not damaged:
        return None
    if damaged == [len(texts)]:
        return f"The last line of {path} was cut off, and is dropped."
    return f"{path} has {len(damaged)} line(s) that cannot be read, the first line {damaged[0]}. They are dropped."
