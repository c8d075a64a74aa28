"""Damage to a run's folder, a killed loader and a full disk end in a sentence; what can be finished is finished."""

import functools
import gc
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip2x_training import cache_features, pretrain_stage1
from blip2x_training.capfilt.progress import Progress
from blip2x_training.data.bad_rows import SkipLog
from blip2x_training.data.caption_dataset import make_loader
from blip2x_training.data.killed_workers import workers_may_die
from blip2x_training.engine import finish
from blip2x_training.engine.checkpoint import read_state, steps_saved
from blip2x_training.evaluation.journal import whole_lines
from tests.helpers.processes import Script, flags, full_disk, make_parts

STEPS = 4


@pytest.fixture(scope="module")
def fields(tmp_path_factory) -> dict:
    """Fields of a run of 4 steps with a checkpoint every 2."""
    parts = make_parts(tmp_path_factory.mktemp("damage"), rows=8)
    return {**parts, "max_steps": STEPS, "save_steps": 2, "dataloader_num_workers": 0, "eval_split": "validation"}


@pytest.fixture(scope="module")
def whole(fields, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    pretrain_stage1.main(flags({**fields, "output_dir": out}))
    return out


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


def run(fields: dict, out: Path, **more) -> None:
    pretrain_stage1.main(flags({**fields, "output_dir": out, **more}))


def losses(out: Path) -> list[tuple]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line.get("loss", line.get("eval_loss"))) for line in lines]


@pytest.mark.parametrize("killed_in", ["save_root", "draw_curves", "mark_finished"])
def test_a_run_that_died_between_its_last_checkpoint_and_its_end_is_finished(
    fields, whole, tmp_path, monkeypatch, capsys, killed_in
):
    """The root was that of step 2, of a shorter run before, all the while."""
    out = tmp_path / "out"
    run(fields, out, max_steps=2)
    assert json.loads((out / "finished.json").read_text()).items() >= {"steps": 2, "weights_of_step": 2}.items()

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finish, killed_in, die)
        run(fields, out)
    assert steps_saved(out)[-1] == STEPS and (out / "config.json").exists()
    (out / "curves.png").unlink(missing_ok=True)
    capsys.readouterr()
    run(fields, out)
    assert "Finished." in capsys.readouterr().out
    trained = load_file(out / "checkpoints" / f"step_{STEPS}" / "trained.safetensors")
    root = load_file(out / "model.safetensors")
    assert all(torch.equal(root[name], tensor) for name, tensor in trained.items())
    assert (out / "curves.png").stat().st_size > 1000
    finished = json.loads((out / "finished.json").read_text())
    assert finished.items() >= {"steps": STEPS, "weights_of_step": STEPS}.items()
    assert [step for step, _ in losses(out)] == [1, 2, 2, 3, 4, 4]
    run(fields, out)
    assert f"is finished: {STEPS} steps" in capsys.readouterr().out


def test_killed_before_its_end_and_then_told_to_take_fewer_steps(fields, copy, capsys):
    (copy / "finished.json").unlink()
    run(fields, copy, max_steps=3)
    assert json.loads((copy / "finished.json").read_text())["steps"] == STEPS
    assert "is a complete checkpoint (step 4)" in capsys.readouterr().out


FILES = ("trained.safetensors", "optimizer.pt", "random_states.pt", "state.json")


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_of_a_checkpoint_is_found_before_it_is_used(fields, copy, name):
    path, draw = copy / "checkpoints" / "step_4" / name, random.Random(name)
    content = path.read_bytes()
    for place in [len(content) - 1, *(draw.randrange(len(content)) for _ in range(3))]:
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        said = f"step_4/{name} is missing or damaged .*Delete the folder step_4 to continue from step 2, or pass --over"
        with pytest.raises(ValueError, match=said):
            run(fields, copy, max_steps=5)
    shutil.rmtree(path.parent)
    run(fields, copy, max_steps=5)
    assert read_state(copy)["step"] == 5


def test_any_flipped_bit_of_state_json_is_found_or_changes_nothing(copy):
    path = copy / "checkpoints" / "step_4" / "state.json"
    content, wanted, found = path.read_bytes(), read_state(copy), 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            assert read_state(copy) == wanted, f"byte {place}"  # white space between two fields
        except ValueError:
            found += 1
    assert found > 0.95 * len(content)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"null", b"{}", b'{"step": "4", "samples_seen": 1}', b"\xff\xfe", b"{"),
        # Of an earlier version, without a checksum: what it says is all there is to judge by.
        b'{"step": true, "samples_seen": 16}',
        b'{"step": -4, "samples_seen": 16}',
        b'{"step": 3, "samples_seen": 16}',
        b'{"step": 4, "samples_seen": 16, "best": 5}',
        b'{"step": 4, "samples_seen": 16, "best": {}}',
        b'{"step": 4, "samples_seen": 16, "made_from": 7}',
    ],
)
def test_a_broken_state_is_named_with_the_way_out(fields, copy, content):
    (copy / "checkpoints" / "step_4" / "state.json").write_bytes(content)
    shutil.rmtree(copy / "checkpoints" / "step_2")
    with pytest.raises(
        ValueError, match=r"step_4/state.json is missing or damaged .*\)\. Pass --overwrite_output_dir to"
    ):
        run(fields, copy, max_steps=5)
    run(fields, copy, max_steps=1, overwrite_output_dir=True)
    assert steps_saved(copy) == [1]


@pytest.mark.parametrize("content", [b"a: [", b"- 1", b"", b"\xff\xfe\x00", b"5", b"d: 2026-99-99"])
def test_a_broken_config_is_told_and_written_anew(fields, whole, copy, content, capsys):
    (copy / "config.yaml").write_bytes(content)
    run(fields, copy, max_steps=5)
    said = capsys.readouterr().out
    assert said.count("config.yaml is damaged (") == 1 and "it is written anew" in said
    assert (copy / "config.yaml").read_text() == (whole / "config.yaml").read_text().replace(
        str(whole), str(copy)
    ).replace("max_steps: 4", "max_steps: 5")


LINES = {
    b'{"step": 4, "lo': "The last line of .*metrics.jsonl was cut off, and is dropped",
    b"garbage\n": r"metrics.jsonl has 1 line\(s\) that cannot be read, the first line 6. They are dropped",
    b'5\n[]\n{"lr": 1}\n{"step": "x"}\n\xff\xfe\n': r"has 5 line\(s\) that cannot be read, the first line 6\.",
    b'{"step": 3, "loss": "x", "lr": 1}\n{"step": 3, "loss": [], "lr": 1}\n': r"has 2 line\(s\) that cannot be read",
}


@pytest.mark.parametrize("content", LINES)
def test_broken_lines_of_metrics_are_dropped_and_told(fields, copy, content, capsys):
    path = copy / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + content)
    run(fields, copy, max_steps=5)
    assert re.search(LINES[content], capsys.readouterr().out)
    assert [step for step, _ in losses(copy)] == [1, 2, 3, 4, 4, 5, 5]


def test_lost_metrics_are_told_at_the_end(fields, copy, capsys):
    for name in ("metrics.jsonl", "finished.json"):
        (copy / name).unlink()
    run(fields, copy)
    assert "metrics.jsonl has no lines of training: they were lost." in capsys.readouterr().out


def test_a_changed_finished_json_finishes_nothing(fields, copy, capsys):
    path = copy / "finished.json"
    path.write_text(path.read_text().replace('"steps": 4', '"steps": 6'))
    run(fields, copy, max_steps=6)
    assert read_state(copy)["step"] == 6 and "is finished" not in capsys.readouterr().out
    path.write_text('{"steps": 6, "weights_of_step": 6}')  # of an earlier version
    run(fields, copy, max_steps=6)
    assert "is finished: 6 steps" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["random_states.pt", "averages.pt"])
def test_another_structure_in_a_checkpoint_without_checksums_is_damage(fields, tmp_path, name):
    out = tmp_path / "out"
    run(fields, out, max_steps=2, ema_decay=0.9)
    step = out / "checkpoints" / "step_2"
    torch.save([5], step / name)
    (step / "state.json").write_text('{"step": 2, "samples_seen": 16}')
    with pytest.raises(ValueError, match=f"step_2/{name} is missing or damaged"):
        run(fields, out, max_steps=3, ema_decay=0.9)


@pytest.mark.parametrize("line", ["5", "[]", "null", '{"dataset": [], "split": "a", "row": 1}', '{"dataset": "a"}'])
def test_lines_of_skipped_jsonl_that_are_none_are_passed_over(tmp_path, line):
    (tmp_path / "skipped.jsonl").write_text(line + "\n")
    log = SkipLog(tmp_path / "skipped.jsonl", [], {("d", "train")}, 10**6, max_fraction=1.0)
    log.add([{"dataset": "d", "split": "train", "row": 3, "name": "n", "reason": "r"}], 4)
    assert log.found == 1 and '"row": 3' in (tmp_path / "skipped.jsonl").read_text().splitlines()[1]


def kill_a_worker_in_step(step: int) -> None:
    from blip2x_training.engine import train_loop

    log = train_loop.log

    def log_and_kill(accelerator, output_dir, line):
        log(accelerator, output_dir, line)
        if line["step"] == step:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    train_loop.log = log_and_kill


def test_a_killed_loader_worker_ends_the_run_with_a_sentence(fields, tmp_path):
    given = {
        **fields,
        "output_dir": tmp_path / "out",
        "dataloader_num_workers": 2,
        "max_steps": 200,
        "eval_split": "null",
    }
    script = Script(given, tmp_path / "log", patch=functools.partial(kill_a_worker_in_step, 3))
    assert script.wait() == [1]
    said = script.text()
    assert "error: A process that loads data has died (" in said and "Traceback" not in said, said[-3000:]
    last = steps_saved(tmp_path / "out")[-1]
    assert last >= 2 and f"The one of step {last} is intact. The same command continues from there." in said
    assert "pass a smaller --dataloader_num_workers" in said


def test_a_lost_connection_to_a_worker_is_its_death_and_another_missing_file_is_not(tmp_path):
    said = "process that loads data has died .*No such file or directory.*Go on. If it was killed"
    with pytest.raises(OSError, match=said), workers_may_die(lambda: "Go on."):
        multiprocessing.connection.Client(str(tmp_path / "socket"))
    with pytest.raises(FileNotFoundError, match="nothing$|nothing'$"), workers_may_die(lambda: "Go on."):
        (tmp_path / "nothing").read_bytes()


def test_a_disk_that_fills_up_while_features_are_cached_is_told(fields, tmp_path):
    """After the check of free space; by an error of a write, where a memory map's would be SIGBUS."""
    cache = tmp_path / "cache"
    given = ["--dataset", str(fields["dataset"]), "--vision_model", str(fields["vision_model"])]
    given += ["--output_dir", str(cache), "--splits", "train", "--shard_size", "4", "--batch_size", "1"]
    said = "train-00000-of-00002.npy could not be written .*File too large.*free some space and give the same command"
    with full_disk(1500), pytest.raises(OSError, match=said):  # two images of 480 bytes, and the header
        cache_features.main(given)
    assert [path.name for path in cache.iterdir()] == ["train.json.begun"]
    cache_features.main(given)
    assert {path.name for path in cache.iterdir()} == {"train.json", *(f"train-0000{n}-of-00002.npy" for n in (0, 1))}


def test_a_broken_description_of_a_cache_is_named(fields, tmp_path):
    given = ["--dataset", str(fields["dataset"]), "--vision_model", str(fields["vision_model"])]
    given += ["--output_dir", str(tmp_path), "--splits", "train"]
    for content in ("{", "[]"):
        (tmp_path / "train.json").write_text(content)
        with pytest.raises(ValueError, match="train.json is damaged .*Delete .* and write the cache again"):
            cache_features.main(given)


def test_progress_of_bootstrap_and_evaluation_drops_a_last_half_line_and_names_a_broken_one(tmp_path):
    path = tmp_path / ".progress" / "train.jsonl"
    progress = Progress(path, {"seed": 1}, 3, 1, overwrite=False)
    progress.add([{"row": 0, "captions": ["a"]}, {"row": 1, "captions": ["b"]}])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"row": 2, "cap')
    assert len(Progress(path, {"seed": 1}, 3, 1, overwrite=False).records) == 2 and path.read_bytes() == whole
    for broken in (whole.replace(b'"row": 0', b'"row: 0'), whole.replace(b'"row": 1', b'"row": 0'), b"[]\n"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"train.jsonl, line \d is damaged.*Delete the file to start over"):
            Progress(path, {"seed": 1}, 3, 1, overwrite=False)
    journal = tmp_path / "results.0.jsonl"
    journal.write_bytes(b'[0, "a"]\n[1, "b"')
    assert whole_lines(journal, repair=True) == {0: "a"} and journal.read_bytes() == b'[0, "a"]\n'
    for broken in (b'[0, "a"\n[1, "b"]\n', b'{"0": "a"}\n'):
        journal.write_bytes(broken)
        with pytest.raises(ValueError, match="results.0.jsonl.* is damaged.*Delete the folder .progress to start over"):
            whole_lines(journal, repair=True)


class Hung(torch.utils.data.Dataset):
    """Its second item never comes."""

    skip_log = None

    def __getitem__(self, number: int) -> dict:
        while number == 1:
            time.sleep(60)
        return {"number": number, "frozen": gc.get_freeze_count()}


def first_of(items: list[dict]) -> dict:
    return {name: torch.tensor([item[name] for item in items]) for name in ("number", "frozen")}


def test_a_worker_that_hangs_ends_the_run_with_a_sentence():
    batches = iter(make_loader(Hung(), [[0], [1]], first_of, 1, pin_memory=False, timeout=1))
    with pytest.raises(OSError, match="have given nothing for --dataloader_timeout.*Go on. A file system that hangs"):
        with workers_may_die(lambda: "Go on."):
            list(batches)


def test_workers_leave_what_they_share_where_it_is():
    """A garbage collection in a worker looks at none of it, and this process goes on as before."""
    (batch,) = make_loader(Hung(), [[0]], first_of, 1, pin_memory=False)
    assert batch["frozen"].item() > 10_000 and gc.get_freeze_count() == 0
