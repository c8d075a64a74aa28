"""Killed at many moments and continued: the merged folder, tars in a mixture with three workers, CapFilt."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip2x_training.engine.checkpoint import steps_saved
from tests.helpers.processes import PATIENCE, STAGE1, flags, make_parts, steps_logged, until
from tests.helpers.training_parts import make_tars

pytestmark = pytest.mark.slow

TRAINING = Path(__file__).parents[2] / "training"


def start(script: str, fields: dict, log: Path) -> subprocess.Popen:
    command = [sys.executable, str(TRAINING / script), *flags(fields)]
    with open(log, "a") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill_when(process: subprocess.Popen, condition) -> bool:
    """Kill -9 when the condition holds; whether it was still running then."""
    until(lambda: process.poll() is not None or condition(), pause=0.001)
    process.kill()
    return process.wait() == -signal.SIGKILL


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def lines_of(out: Path) -> list[tuple]:
    return [(line["step"], line["loss"]) for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]


def test_killed_while_root_and_merged_are_written(tmp_path):
    """At ten moments from the last checkpoint to the end; the root that is replaced is that of a shorter run."""
    fields = {**make_parts(tmp_path, rows=8), "max_steps": 4, "save_steps": 2, "dataloader_num_workers": 0}
    fields |= {"lora": "qformer", "merge_lora": True}
    log = tmp_path / "log"
    for name in ("whole", "out"):
        assert start("pretrain_stage1.py", {**fields, "output_dir": tmp_path / name, "max_steps": 2}, log).wait() == 0
    assert start("pretrain_stage1.py", {**fields, "output_dir": tmp_path / "whole"}, log).wait(PATIENCE) == 0
    out, whole, temporary = tmp_path / "out", tmp_path / "whole", tmp_path / "out" / ".root.tmp"
    moments = [
        lambda: 4 in steps_saved(out),
        lambda: temporary.exists(),
        lambda: (temporary / "adapter_config.json").exists() or (temporary / "adapter_model.safetensors").exists(),
        lambda: (temporary / "merged").exists(),
        lambda: (temporary / "merged" / "model.safetensors").exists(),
        lambda: (temporary / "merged" / "config.json").exists(),
        lambda: not (out / "finished.json").exists(),
        lambda: not (out / "finished.json").exists() and not (temporary / "merged").exists(),
        lambda: not (out / "finished.json").exists() and not temporary.exists(),
        lambda: not (out / "finished.json").exists() and (out / ".curves.png.tmp").exists(),
    ]
    killed = 0
    for moment in moments:
        killed += kill_when(start("pretrain_stage1.py", {**fields, "output_dir": out}, log), moment)
    assert killed >= 6, "most of them ended before they were killed"
    assert start("pretrain_stage1.py", {**fields, "output_dir": out}, log).wait(PATIENCE) == 0
    assert json.loads((out / "finished.json").read_text()).items() >= {"steps": 4, "weights_of_step": 4}.items()
    assert same_weights(out / "merged" / "model.safetensors", whole / "merged" / "model.safetensors")
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert {path.name for path in (out / "merged").iterdir()} == {path.name for path in (whole / "merged").iterdir()}
    assert lines_of(out) == lines_of(whole)


def test_killed_in_a_mixture_of_tars_with_three_workers(tmp_path):
    """Ten times at random steps, its workers left to themselves."""
    tars = {name: Path(make_tars(tmp_path / name, counts)[0]).parent for name, counts in (("a", [9, 7]), ("b", [5]))}
    parts = make_parts(tmp_path / "parts")
    fields = {**STAGE1, "vision_model": parts["vision_model"], "text_column": "text", "dataloader_num_workers": 3}
    fields |= {"max_steps": 60, "save_steps": 3}
    data = ["--dataset", *map(str, tars.values()), "--dataset_weights", "3", "1"]

    def begin(out: Path) -> subprocess.Popen:
        command = [sys.executable, str(TRAINING / "pretrain_stage1.py"), *flags({**fields, "output_dir": out}), *data]
        with open(tmp_path / "log", "a") as file:
            return subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})

    whole, out, drawn = tmp_path / "whole", tmp_path / "out", random.Random(0)
    assert begin(whole).wait(PATIENCE) == 0
    for _ in range(10):
        wanted = min(58, steps_logged(out) + drawn.randint(1, 7))
        assert kill_when(begin(out), lambda wanted=wanted: steps_logged(out) >= wanted), (tmp_path / "log").read_text()
    assert begin(out).wait(PATIENCE) == 0
    assert same_weights(out / "model.safetensors", whole / "model.safetensors") and lines_of(out) == lines_of(whole)
    assert not [path.name for path in out.rglob(".*")]


def test_killed_in_captioning(tmp_path):
    """At every batch, and while the data set is written."""
    fields = {**make_parts(tmp_path, rows=12), "max_steps": 8, "save_steps": 8, "output_dir": tmp_path / "stage1"}
    assert start("pretrain_stage1.py", fields, tmp_path / "log").wait(PATIENCE) == 0
    given = {"dataset": tmp_path / "data", "captioner": tmp_path / "stage1", "text_column": "captions"}
    given |= {"num_captions": 4, "max_new_tokens": 6, "min_new_tokens": 2, "batch_size": 3}
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert start("bootstrap_captions.py", {**given, "output_dir": whole}, tmp_path / "log").wait(PATIENCE) == 0
    progress, killed = out / ".progress" / "train.jsonl", 0
    moments = [lambda: (out / ".lock").exists(), lambda: progress.exists()]
    moments += [lambda n=n: progress.exists() and progress.read_bytes().count(b"\n") > n for n in (3, 6, 9, 12)]
    moments += [lambda: (out / "train.jsonl").exists()]
    for moment in moments:
        process = start("bootstrap_captions.py", {**given, "output_dir": out}, tmp_path / "log")
        killed += kill_when(process, moment)
    assert killed >= 5
    assert start("bootstrap_captions.py", {**given, "output_dir": out}, tmp_path / "log").wait(PATIENCE) == 0
    for name in ("train.jsonl", ".progress/train.jsonl", "skipped.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
