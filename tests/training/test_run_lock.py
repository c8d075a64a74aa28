"""One process at a time writes a folder: a second one is told who has it, and a dead one's lock is taken over."""

import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from blip2x_training import (
    bootstrap_captions,
    cache_features,
    caption_language,
    finetune,
    pretrain_stage1,
    pretrain_stage2,
    quickstart,
    run_evaluation,
)
from blip2x_training.system import run_lock
from blip2x_training.system.run_lock import locked_folder, start_of, this_process
from tests.helpers.processes import Script, make_parts
from tests.helpers.training_parts import make_image_folder, make_vision_model

fork = multiprocessing.get_context("fork")


def hold(folder: Path, told) -> None:
    with locked_folder(folder):
        told.send(os.getpid())
        time.sleep(600)


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/out."""
    here, there = fork.Pipe()
    process = fork.Process(target=hold, args=(tmp_path / "out", there))
    process.start()
    here.recv()
    yield process
    process.kill()
    process.join()


def test_the_second_is_told_who_holds_it_and_since_when(holder, tmp_path):
    path = tmp_path / "out" / ".lock"
    named = json.loads(path.read_text())
    said = f"out is in use by process {holder.pid} on {socket.gethostname()} \\(since {named['since'][:10]} .*another --out"
    with pytest.raises(ValueError, match=said), locked_folder(tmp_path / "out"):
        pass
    assert json.loads(path.read_text()) == named


def test_a_dead_holders_lock_is_taken_over_and_a_worker_does_not_keep_it(tmp_path, capsys):
    out, (here, there) = tmp_path / "out", fork.Pipe()

    def with_a_worker():
        with locked_folder(out):
            worker = fork.Process(target=time.sleep, args=(600,))
            worker.start()
            there.send(worker.pid)
            time.sleep(600)

    holder = fork.Process(target=with_a_worker)
    holder.start()
    worker = here.recv()
    try:
        holder.kill()
        holder.join()
        assert (out / ".lock").exists()
        with locked_folder(out):
            assert json.loads((out / ".lock").read_text())["pid"] == os.getpid()
        assert f"Taking over {out} from process {holder.pid} on" in capsys.readouterr().out
        assert list(out.iterdir()) == []
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("locks", [True, False])
def test_another_host_is_named_with_the_way_to_remove_its_lock(tmp_path, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr(run_lock, "try_lock", lambda descriptor: None)
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "2026-01-02 03:04:05+00:00", "started": "1"}))
    said = "in use by process 7 on elsewhere \\(since 2026-01-02 03:04:05.*cannot see whether.*delete .*/.lock and give"
    with pytest.raises(ValueError, match=said), locked_folder(tmp_path):
        pass
    lock.unlink()
    with locked_folder(tmp_path):
        pass


@pytest.mark.parametrize("started, held", [("own", True), ("1", False)])
def test_without_locks_of_the_file_system_a_number_that_is_used_again_is_no_holder(
    tmp_path, monkeypatch, started, held
):
    monkeypatch.setattr(run_lock, "try_lock", lambda descriptor: None)
    parent = os.getppid()
    named = this_process() | {"pid": parent, "started": start_of(parent) if started == "own" else started}
    (tmp_path / ".lock").write_text(json.dumps(named))
    if held:
        with pytest.raises(ValueError, match=f"in use by process {parent} on"), locked_folder(tmp_path):
            pass
    else:
        with locked_folder(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_folder_that_was_made_for_the_lock_alone_goes_with_it(tmp_path):
    with locked_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with locked_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["result"]


def test_every_script_that_writes_a_folder_asks(holder, tmp_path):
    make_image_folder(tmp_path / "data", {"train": 4})
    make_vision_model(tmp_path / "tower")
    data, tower, out = (str(tmp_path / name) for name in ("data", "tower", "out"))
    commands = {
        pretrain_stage1: ["--dataset", data, "--vision_model", tower],
        pretrain_stage2: ["--dataset", data, "--vision_model", tower, "--language_model", tower],
        caption_language: ["--dataset", data],
        finetune: ["--dataset", data, "--init_from", tower, "--task", "caption"],
        cache_features: ["--dataset", data, "--vision_model", tower],
        bootstrap_captions: ["--dataset", data, "--captioner", tower],
        run_evaluation: ["--data", data, "--model", tower, "--task", "caption"],
        quickstart: [],
    }
    for script, given in commands.items():
        with pytest.raises(ValueError, match=f"in use by process {holder.pid} on"):
            script.main([*given, "--output_dir", out])
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_two_processes_are_both_told_and_end(holder, tmp_path):
    fields = {**make_parts(tmp_path), "output_dir": tmp_path / "out", "max_steps": 2}
    script = Script(fields, tmp_path / "log", processes=2)
    assert script.wait() == [1, 1]
    assert script.text().count(f"error: {tmp_path / 'out'} is in use by process {holder.pid}") == 2


def test_of_two_that_start_at_once_one_trains(tmp_path):
    fields = {**make_parts(tmp_path), "output_dir": tmp_path / "out", "max_steps": 4, "dataloader_num_workers": 0}
    scripts = [Script(fields, tmp_path / f"log{number}") for number in range(2)]
    ends = {script.wait()[0]: script.text() for script in scripts}
    assert 0 in ends and ends.keys() <= {0, 1}
    if 1 in ends:  # else the second began after the first had ended
        assert "out is in use by process" in ends[1]
    lines = [json.loads(line)["step"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4]


@pytest.mark.parametrize("pid", [None, [], {}, "7", 0, -1, 10**400, True])
def test_a_lock_that_names_no_process_is_nobodys(tmp_path, monkeypatch, pid):
    monkeypatch.setattr(run_lock, "try_lock", lambda descriptor: None)
    (tmp_path / ".lock").write_text(
        json.dumps({"host": socket.gethostname(), "pid": pid, "since": "x", "started": "1"})
    )
    with locked_folder(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
