"""What ends a run before its end, and what the same command makes of it afterwards."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pretrain_stage1
import pytest
import torch
from accelerate.state import AcceleratorState
from checkpoint import clear_leftovers, steps_saved
from processes import Script, flags, make_parts, steps_logged, until
from safetensors.torch import load_file

TRAINING = Path(__file__).parent.parent / "training"
STEPS = 12


@pytest.fixture(scope="module")
def fields(tmp_path_factory) -> dict:
    """Fields of a run of 12 steps with a checkpoint every 2."""
    return {**make_parts(tmp_path_factory.mktemp("faults")), "max_steps": STEPS, "save_steps": 2}


@pytest.fixture
def new_precision():
    """accelerate keeps the precision of a process's first run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


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
    import durable

    calls = []

    def sync_or_die(folder):
        calls.append(folder)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    durable.sync_folder = sync_or_die


def test_killed_three_times_and_equal_to_the_bit(fields, whole, tmp_path):
    out = tmp_path / "out"
    run = {**fields, "output_dir": out}
    script = Script(run, tmp_path / "log", patch=die_in_second_save)
    assert script.wait() == [-signal.SIGKILL]
    assert steps_saved(out) == [2] and leftovers(out), "it did not die in the middle of a save"
    for step in (5, 9):
        script = Script(run, tmp_path / "log")
        until(lambda step=step: steps_logged(out) >= step)
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

    def wait_for_a_save(out: Path) -> None:
        clear_leftovers(out)
        saves, wanted, saving = 0, draw.randint(1, 4), False
        while saves < wanted:
            was, saving = saving, bool(list((out / "checkpoints").glob(".step_*.tmp")))
            saves += saving and not was

    assert start(tmp_path / "whole").wait(300) == 0
    out, in_save = tmp_path / "out", 0
    for number in range(20):
        before, process = steps_logged(out), start(out)
        if number % 10 == 9:
            time.sleep(draw.uniform(0, 6))
        elif number % 2:
            until(lambda before=before: steps_logged(out) > before, timeout=300)
            time.sleep(draw.uniform(0, 1.5))
        else:
            wait_for_a_save(out)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        in_save += bool(list((out / "checkpoints").glob(".step_*.tmp")))
    print(f"{in_save} kills in the middle of a save; killed for the last time after step {steps_saved(out)[-1]}")
    assert in_save >= 5
    assert start(out).wait(300) == 0
    assert_same(out, tmp_path / "whole")


def test_full_disk_is_an_error_that_leaves_the_checkpoint_before(fields, whole, tmp_path, monkeypatch):
    import loop

    out, save, hard = tmp_path / "out", loop.save_step, resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def save_on_a_full_disk(output_dir, state, *rest):
        if state["step"] > 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the checkpoint is larger, the metrics are not
        try:
            save(output_dir, state, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_step", save_on_a_full_disk)
        with pytest.raises(OSError, match="checkpoint of step 4 could not be written.*The one of step 2 is intact"):
            pretrain_stage1.main(flags({**fields, "output_dir": out}))
    assert steps_saved(out) == [2] and not leftovers(out)
    pretrain_stage1.main(flags({**fields, "output_dir": out}))
    assert_same(out, whole)


def test_full_disk_at_the_very_end_leaves_the_checkpoints(fields, whole, tmp_path, monkeypatch):
    from safetensors import torch as writer

    out = tmp_path / "out"

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        import transformers.modeling_utils as modeling_utils

        assert modeling_utils.safe_save_file is writer.save_file
        patch.setattr(modeling_utils, "safe_save_file", no_space)
        with pytest.raises(OSError, match=f"No space left.*The one of step {STEPS} is intact"):
            pretrain_stage1.main(flags({**fields, "output_dir": out}))
    assert steps_saved(out)[-1] == STEPS and not leftovers(out) and not (out / "config.json").exists()
    pretrain_stage1.main(flags({**fields, "output_dir": out}))
    assert_same(out, whole)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_exit(fields, whole, tmp_path, number, code):
    """Also when the loader's workers get the signal too, as from a terminal or a batch system."""
    out = tmp_path / "out"
    run = {**fields, "output_dir": out, "save_steps": 1000}
    script = Script(run, tmp_path / "log")
    until(lambda: steps_logged(out) >= 3)
    script.send(number, group=True)
    assert script.wait() == [code], script.text()
    step = steps_saved(out)[-1]
    assert 3 <= step < STEPS, "it ended before the signal came"
    assert f"Stopped after step {step} of {STEPS}, saved. The same command continues." in script.text()
    assert Script(run, tmp_path / "log").wait() == [0]
    assert_same(out, whole)


def test_a_signal_to_one_process_stops_all_at_the_same_step(fields, tmp_path):
    out = tmp_path / "out"
    run = {**fields, "output_dir": out, "max_steps": 1000, "save_steps": 1000, "per_device_train_batch_size": 2}
    script = Script(run, tmp_path / "log", processes=2)
    until(lambda: steps_logged(out) >= 3)
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


def test_float16_survives_gradients_that_overflow(fields, tmp_path, monkeypatch, new_precision):
    """The scaler skips such a step and lowers its scale; only a loss that is not finite ends the run."""
    start, scales = torch.amp.GradScaler.__init__, []

    class TooHigh(torch.amp.GradScaler):
        def __init__(self, device):
            start(self, device, init_scale=2.0**40)

        def update(self):
            super().update()
            scales.append(self.get_scale())

    monkeypatch.setattr(torch.amp, "GradScaler", TooHigh)
    lines = train_in("fp16", fields, tmp_path / "out")
    assert all(scale == 2.0 ** (39 - number) for number, scale in enumerate(scales[:5])), scales
    assert scales[-1] >= scales[-20] / 2  # a step may still overflow now and then
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "grad_norm" not in lines[0] and lines[-1]["grad_norm"] > 0
    saved = torch.load(tmp_path / "out/checkpoints/step_50/scaler.pt", weights_only=True)
    assert saved["scale"] == scales[-1]


def test_fifty_steps_of_bfloat16_are_finite(fields, tmp_path, new_precision):
    lines = train_in("bf16", fields, tmp_path / "out")
    assert lines[-1]["loss"] < lines[0]["loss"]


def train_in(precision: str, fields: dict, out: Path) -> list[dict]:
    """Lines of fifty steps; a loss that is not finite would raise."""
    run = {**fields, "output_dir": out, precision: True, "max_steps": 50, "save_steps": 50, "dataloader_num_workers": 0}
    pretrain_stage1.main(flags({**run, "gradient_accumulation_steps": 1}))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 50
    return lines


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
