"""What ends a run before its end, and what the same command makes of it afterwards."""

import contextlib
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip2x_training import pretrain_stage1
from blip2x_training.engine.checkpoint import clear_leftovers, steps_saved
from tests.helpers.processes import PATIENCE, Script, flags, full_disk, make_parts, steps_logged, until

TRAINING = Path(__file__).parents[2] / "training"
STEPS = 12


@pytest.fixture(scope="module")
def fields(tmp_path_factory) -> dict:
    """Fields of a run of 12 steps with a checkpoint every 2."""
    return {**make_parts(tmp_path_factory.mktemp("faults")), "max_steps": STEPS, "save_steps": 2}


@pytest.fixture(scope="module")
def whole(fields, tmp_path_factory) -> Path:
    """The run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    pretrain_stage1.main(flags({**fields, "output_dir": out}))
    return out


def assert_same(out: Path, whole: Path) -> None:
    """Same weights to the bit, same losses in metrics.jsonl, and nothing left over."""
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, out))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (whole, out)
    ]
    assert [(line["step"], line["loss"]) for line in lines[0]] == [(line["step"], line["loss"]) for line in lines[1]]
    assert not leftovers(out)


def leftovers(out: Path) -> list[Path]:
    return [path for path in out.rglob(".*")]


def die_in_second_save() -> None:
    """kill -9 when all files of the second checkpoint are written, but not under their name yet."""
    from blip2x_training.system import atomic_files

    calls = []

    def sync_or_die(folder):
        calls.append(folder)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    atomic_files.sync_folder = sync_or_die


def hold_after(step: int, stopped_goes_on: bool = False) -> None:
    """Nothing happens after the log line of a step, until a kill; or until a signal that is to end the run."""
    from blip2x_training.engine import train_loop

    log, stops = train_loop.log, []

    class Known(train_loop.StopSignal):
        def __enter__(self):
            stops.append(self)
            return super().__enter__()

    def log_and_hold(accelerator, output_dir, line):
        log(accelerator, output_dir, line)
        while line["step"] == step and not (stopped_goes_on and stops[-1].number):
            time.sleep(0.01)

    train_loop.log, train_loop.StopSignal = log_and_hold, Known


def test_killed_three_times_and_equal_to_the_bit(fields, whole, tmp_path):
    out = tmp_path / "out"
    run = {**fields, "output_dir": out}
    script = Script(run, tmp_path / "log", patch=die_in_second_save)
    assert script.wait() == [-signal.SIGKILL]
    assert steps_saved(out) == [2] and leftovers(out), "it did not die in the middle of a save"
    for step in (5, 9):
        script = Script(run, tmp_path / "log", patch=functools.partial(hold_after, step))
        script.wait_for_step(out, step)
        script.kill()
        assert script.wait() == [-signal.SIGKILL]
        assert not (out / "model.safetensors").exists()
    assert Script(run, tmp_path / "log").wait() == [0]
    assert_same(out, whole)


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments(fields, tmp_path):
    """The script itself: ten times in the middle of a save, eight times anywhere in training, twice while it starts."""
    run = {**fields, "max_steps": 200, "save_steps": 3}
    draw = random.Random(0)
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # in so small a model several only wait for one another

    def start(out: Path) -> subprocess.Popen:
        command = [sys.executable, str(TRAINING / "pretrain_stage1.py"), *flags({**run, "output_dir": out})]
        with open(tmp_path / f"{out.name}.log", "a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=one_thread)

    assert start(tmp_path / "whole").wait(PATIENCE) == 0
    out, in_save = tmp_path / "out", 0
    for number in range(20):
        before, process = steps_logged(out), start(out)
        if number % 10 == 9:
            modules = draw.choice(["libtorch_cpu", "libarrow", "_imaging"])
            until(lambda process=process, modules=modules: process.poll() is not None or has_mapped(process, modules))
        elif number % 2:
            wanted = before + draw.randint(1, 8)
            until(lambda process=process, wanted=wanted: process.poll() is not None or steps_logged(out) >= wanted)
        else:
            stop_in_a_save(process, out, draw.randint(1, 4))
            in_save += 1
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert in_save == 10 and 3 < steps_saved(out)[-1] < 200
    assert start(out).wait(PATIENCE) == 0
    assert_same(out, tmp_path / "whole")


def has_mapped(process: subprocess.Popen, library: str) -> bool:
    return library in Path(f"/proc/{process.pid}/maps").read_text()


def stop_in_a_save(process: subprocess.Popen, out: Path, which: int) -> None:
    """Stop (SIGSTOP) a run with a checkpoint half written, the `which`th from here on or one after it."""
    clear_leftovers(out)
    saves, saving = 0, False
    while process.poll() is None:
        was, saving = saving, half_written(out)
        saves += saving and not was
        if saving and saves >= which:
            process.send_signal(signal.SIGSTOP)
            until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
            if half_written(out):
                return
            process.send_signal(signal.SIGCONT)  # the save was over before the signal came


def half_written(out: Path) -> bool:
    return bool(list((out / "checkpoints").glob(".step_*.tmp")))


def test_full_disk_is_an_error_that_leaves_the_checkpoint_before(fields, whole, tmp_path, monkeypatch):
    from blip2x_training.engine import train_loop

    out, save = tmp_path / "out", train_loop.save_step

    def save_on_a_full_disk(output_dir, state, *rest):
        with full_disk(20_000) if state["step"] > 2 else contextlib.nullcontext():  # metrics.jsonl is smaller
            save(output_dir, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_loop, "save_step", save_on_a_full_disk)
        with pytest.raises(OSError, match="checkpoint of step 4 could not be written.*The one of step 2 is intact"):
            pretrain_stage1.main(flags({**fields, "output_dir": out}))
    assert steps_saved(out) == [2] and not leftovers(out)
    pretrain_stage1.main(flags({**fields, "output_dir": out}))
    assert_same(out, whole)


@pytest.mark.parametrize("named", ["model.safetensors", "tokenizer.json"])
def test_full_disk_at_the_very_end_leaves_the_checkpoints(fields, whole, tmp_path, monkeypatch, named):
    """The system refuses the root's largest file; without weights, which would be refused first, its tokenizer."""
    from blip2x_training.engine import finish

    out, save, size = tmp_path / "out", finish.save_root, (whole / named).stat().st_size - 1

    def save_on_a_full_disk(output_dir, model, *parts):
        with full_disk(size):
            save(output_dir, *(parts if named == "tokenizer.json" else (model, *parts)))

    with monkeypatch.context() as patch:
        patch.setattr(finish, "save_root", save_on_a_full_disk)
        with pytest.raises(OSError, match=f"File too large.*The one of step {STEPS} is intact"):
            pretrain_stage1.main(flags({**fields, "output_dir": out}))
    assert steps_saved(out)[-1] == STEPS and not leftovers(out)
    assert not (out / "config.json").exists() and not (out / named).exists()
    pretrain_stage1.main(flags({**fields, "output_dir": out}))
    assert_same(out, whole)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_signals_save_and_exit(fields, whole, tmp_path, number, code):
    """Also when the loader's workers get the signal too, as from a terminal or a batch system."""
    out = tmp_path / "out"
    run = {**fields, "output_dir": out, "save_steps": 1000}
    script = Script(run, tmp_path / "log", patch=functools.partial(hold_after, 3, stopped_goes_on=True))
    script.wait_for_step(out, 3)
    script.send(number, group=True)
    assert script.wait() == [code], script.text()
    assert steps_saved(out) == [4]
    assert f"Stopped after step 4 of {STEPS}, saved. The same command continues." in script.text()
    assert Script(run, tmp_path / "log").wait() == [0]
    assert_same(out, whole)


def test_a_signal_to_one_process_stops_all_at_the_same_step(fields, tmp_path):
    out = tmp_path / "out"
    run = {**fields, "output_dir": out, "max_steps": 1000, "save_steps": 1000, "per_device_train_batch_size": 2}
    script = Script(run, tmp_path / "log", processes=2)
    script.wait_for_step(out, 3)
    script.send(signal.SIGTERM, rank=1)
    assert script.wait() == [143, 143], script.text()
    assert len(steps_saved(out)) == 1 and "saved. The same command continues." in script.text()


def break_rank_1() -> None:
    """Give rank 1 a loss that is NaN from its third forward on; nothing is wrong with rank 0."""
    from modeling_blip2x import Blip2xForPreTraining

    forward, calls = Blip2xForPreTraining.forward, []

    def broken(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        calls.append(1)
        if len(calls) >= 3 and os.environ["RANK"] == "1":
            outputs.loss_itm = outputs["loss_itm"] = outputs.loss_itm * float("nan")
            outputs.loss = outputs["loss"] = outputs.loss + outputs.loss_itm
        return outputs

    Blip2xForPreTraining.forward = broken


def test_a_loss_that_is_not_finite_on_one_process_stops_all_and_is_named(fields, tmp_path):
    out = tmp_path / "out"
    run = {**fields, "output_dir": out, "save_steps": 1, "per_device_train_batch_size": 2}
    script = Script(run, tmp_path / "log", processes=2, patch=break_rank_1)
    assert script.wait() == [1, 1], script.text()
    assert script.text().count("error: Step 2: loss_itm is not finite") == 2, script.text()
    assert steps_saved(out) == [1]


def start_too_high() -> None:
    """A first scale of 2^40, and a line for every scale after it."""
    start = torch.amp.GradScaler.__init__

    class TooHigh(torch.amp.GradScaler):
        def __init__(self, device):
            start(self, device, init_scale=2.0**40)

        def update(self):
            super().update()
            print("scale", self.get_scale(), flush=True)

    torch.amp.GradScaler = TooHigh


def test_float16_survives_gradients_that_overflow(fields, tmp_path):
    """The scaler skips such a step and lowers its scale; only a loss that is not finite ends the run."""
    lines, said = train_in("fp16", fields, tmp_path / "out", patch=start_too_high)
    scales = [float(number) for number in re.findall(r"scale (\S+)", said)]
    assert [scale == 2.0 ** (39 - number) for number, scale in enumerate(scales[:5])] == [True] * 5, scales
    assert scales[-1] >= scales[-20] / 2  # a step may still overflow now and then
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "grad_norm" not in lines[0] and lines[-1]["grad_norm"] > 0
    saved = torch.load(tmp_path / "out/checkpoints/step_50/scaler.pt", weights_only=True)
    assert saved["scale"] == scales[-1]


def test_bfloat16_follows_float32_for_fifty_steps(fields, tmp_path):
    half, _ = train_in("bf16", fields, tmp_path / "half")
    full, _ = train_in(None, fields, tmp_path / "full")
    assert half[-1]["loss"] < half[0]["loss"] and half[0]["loss"] != full[0]["loss"]
    assert half[0]["loss"] == pytest.approx(full[0]["loss"], rel=0.01)  # the same weights, batch and dropout


def train_in(precision: str | None, fields: dict, out: Path, patch: Callable | None = None) -> tuple[list[dict], str]:
    """Lines of fifty steps, and what was printed; a loss that is not finite would end the run.

    A process of its own: accelerate keeps the precision of a process's first run.
    """
    run = {**fields, "output_dir": out, "max_steps": 50, "save_steps": 50, "dataloader_num_workers": 0}
    run |= {"gradient_accumulation_steps": 1} | ({precision: True} if precision else {})
    script = Script(run, out.with_suffix(".log"), patch=patch)
    assert script.wait() == [0], script.text()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 50
    return lines, script.text()


def test_the_best_checkpoint_stays_and_can_become_the_root(fields, tmp_path):
    """temperature moves one way, so the first validation is the best by it in one direction."""
    lines = {}
    for name, greater in (("falls", False), ("rises", True)):
        out = tmp_path / name
        run = {**fields, "output_dir": out, "max_steps": 8, "eval_split": "validation", "eval_steps": 3}
        run |= {"save_steps": 100, "save_total_limit": 1, "metric_for_best_model": "eval_temperature"}
        pretrain_stage1.main(flags({**run, "greater_is_better": greater, "load_best_model_at_end": True}))
        lines[name] = {
            line["step"]: line["eval_temperature"]
            for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            if "eval_temperature" in line
        }
        assert sorted(lines[name]) == [3, 6, 8]
        wanted = (max if greater else min)(lines[name], key=lines[name].get)
        best = json.loads((out / "best.json").read_text())
        assert (best["step"], best["value"]) == (wanted, lines[name][wanted])
        assert steps_saved(out) == sorted({wanted, 8})
        assert json.loads((out / f"checkpoints/step_{wanted}/state.json").read_text())["best"]["step"] == wanted
        trained = load_file(out / f"checkpoints/step_{wanted}/trained.safetensors")
        root = load_file(out / "model.safetensors")
        assert all(torch.equal(root[key], tensor) for key, tensor in trained.items())
    assert lines["falls"] == lines["rises"]


def test_unknown_best_metric_is_an_error_that_names_the_figures(fields, tmp_path):
    run = {**fields, "output_dir": tmp_path / "out", "eval_split": "validation", "eval_steps": 1}
    with pytest.raises(ValueError, match="--metric_for_best_model is 'eval_los'.*eval_loss_itc"):
        pretrain_stage1.main(flags({**run, "metric_for_best_model": "eval_los"}))


def test_averaged_weights_resume_and_become_the_root(fields, tmp_path):
    run = {**fields, "ema_decay": 0.9, "max_steps": 6}
    pretrain_stage1.main(flags({**run, "output_dir": tmp_path / "whole"}))
    script = Script({**run, "output_dir": tmp_path / "out"}, tmp_path / "log", patch=die_in_second_save)
    assert script.wait() == [-signal.SIGKILL]
    pretrain_stage1.main(flags({**run, "output_dir": tmp_path / "out"}))
    assert_same(tmp_path / "out", tmp_path / "whole")
    trained = load_file(tmp_path / "out/checkpoints/step_6/trained.safetensors")
    root = load_file(tmp_path / "out/model.safetensors")
    assert any(not torch.equal(root[name], tensor) for name, tensor in trained.items())


def test_environment_is_in_the_run_folder(whole):
    described = json.loads((whole / "environment.json").read_text())
    assert described["seed"] == 42 and described["packages"]["torch"] == torch.__version__
    assert described["packages"]["blip2x"] and described["hardware"] and described["python"]
    assert described["git"] is None or len(described["git"]["revision"]) == 40
