"""FSDP2 over two gloo processes: the same losses as one process, and checkpoints that any number of them continues."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, AutoModelForPreTraining

from blip2x_training.engine.checkpoint import steps_saved
from blip2x_training.engine.sharding import plan_sharding
from tests.helpers.processes import PATIENCE, Script, flags, free_port, make_parts, steps_logged, until
from tests.helpers.training_parts import make_language_model

ROOT = Path(__file__).parents[2]
FSDP2 = {  # what `accelerate launch --config_file training/configs/accelerate/fsdp2.yaml` sets
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
ZERO2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}  # deepspeed_zero2.yaml
STEPS = 4


def no_dropout() -> None:
    """Dropout draws from each process's own random state; without it two processes can equal one."""
    torch.nn.Dropout.forward = lambda self, hidden: hidden


def no_dropout_and_tell_shares() -> None:
    """Print how much of the parameters this process holds."""
    from blip2x_training.engine import train_loop

    no_dropout()
    after_prepare = train_loop.keep_embeddings_whole

    def tell(model):
        after_prepare(model)
        held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
        print(f"holds {held / sum(p.numel() for p in model.parameters()):.2f} of the model", flush=True)

    train_loop.keep_embeddings_whole = tell


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sharded")
    make_parts(root, rows=10)  # batches of 4 do not divide them, nor two processes the 5 rows of the validation
    make_language_model(root / "llm", "opt")
    return root


def fields(parts: Path, stage: int, processes: int, out: Path) -> dict:
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    common = {
        "dataset": parts / "data",
        "vision_model": parts / "tower",
        "output_dir": out,
        "text_column": "captions",
        "per_device_train_batch_size": 4 // processes,
        "gradient_accumulation_steps": 2,
        "num_query_tokens": 4,
        "qformer_config": json.dumps({**shape, "max_position_embeddings": 64, "attention_probs_dropout_prob": 0.0}),
        "eval_split": "validation[:5]",
        "eval_steps": 2,
        "max_steps": STEPS,
        "save_steps": 2,
        "logging_steps": 1,
        "warmup_steps": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
    }
    own = {"min_word_count": 1, "rerank_k": 2} if stage == 1 else {"language_model": parts / "llm"}
    return common | own


def run(parts: Path, stage: int, processes: int, out: Path, sharded: bool | dict, patch=no_dropout) -> list[int]:
    """sharded: by FSDP2, or as an environment says."""
    environment = sharded if isinstance(sharded, dict) else FSDP2 if sharded else {}
    script = Script(
        fields(parts, stage, processes, out),
        out.with_suffix(".log"),
        processes,
        f"pretrain_stage{stage}",
        patch,
        environment,
    )
    codes = script.wait()
    assert codes != [0] * processes or (out / "config.json").exists(), script.text()
    return codes


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2])
def stage_and_whole(request, parts) -> tuple[int, Path]:
    """A stage and its run in one process."""
    out = parts / f"one_{request.param}"
    assert run(parts, request.param, 1, out, sharded=False) == [0]
    return request.param, out


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_equal_runs(one: Path, other: Path) -> None:
    """Losses within 1e-4 and the saved weights within the rounding of a few steps."""
    first, second = lines_of(one), lines_of(other)
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for line, same in zip(first, second):
        for name in line:
            if "loss" in name or name == "grad_norm":
                assert same[name] == pytest.approx(line[name], rel=1e-4, abs=1e-4), (line["step"], name)
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    assert max((first[name] - second[name]).abs().max() for name in first) < 1e-3


def stop_after_two() -> None:
    """As if SIGTERM had come in the second step."""
    from blip2x_training.engine import train_loop

    no_dropout()
    agree = train_loop.agree
    seen = []

    def agree_and_stop(*arguments):
        seen.append(1)
        broken, number = agree(*arguments)
        return broken, 15 if len(seen) == 2 else number

    train_loop.agree = agree_and_stop


def test_fsdp_of_version_1_is_refused():
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(ValueError, match="Set fsdp_version: 2"):
        plan_sharding(accelerator, torch.nn.Linear(1, 1))


def test_sharded_run_equals_one_process_and_loads_there(parts, stage_and_whole):
    stage, one = stage_and_whole
    out = parts / f"sharded_{stage}"
    assert run(parts, stage, 2, out, sharded=True, patch=no_dropout_and_tell_shares) == [0, 0], out.with_suffix(
        ".log"
    ).read_text()
    assert re.findall(r"holds (0\.\d+) of the model", out.with_suffix(".log").read_text()) == ["0.50", "0.50"]
    assert_equal_runs(one, out)
    kind = AutoModelForPreTraining if stage == 1 else AutoModelForImageTextToText
    model, other = kind.from_pretrained(out), kind.from_pretrained(one)
    assert type(model) is type(other) and model.config.architectures == other.config.architectures
    trained = load_file(out / f"checkpoints/step_{STEPS}/trained.safetensors")
    assert all(torch.equal(dict(model.named_parameters())[name], tensor) for name, tensor in trained.items())


@pytest.mark.parametrize("before, after", [("sharded", "sharded"), ("sharded", "one"), ("one", "sharded")])
def test_a_run_goes_on_under_other_processes(parts, stage_and_whole, before, after, tmp_path):
    """Stopped after two of four steps; the other two see the same samples, with the same optimiser state."""
    stage, one = stage_and_whole
    out = tmp_path / "out"
    processes = {"sharded": 2, "one": 1}
    codes = run(parts, stage, processes[before], out, before == "sharded", patch=stop_after_two)
    assert codes == [143] * processes[before], out.with_suffix(".log").read_text()
    assert steps_saved(out) == [2]
    assert run(parts, stage, processes[after], out, after == "sharded") == [0] * processes[after]
    wanted, got = lines_of(one), lines_of(out)
    assert math.isfinite(got[-1]["eval_loss"])
    for line in got:
        if "lr" in line:
            same = next(other for other in wanted if other["step"] == line["step"] and "lr" in other)
            assert line["loss"] == pytest.approx(same["loss"], rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_deepspeed_run_equals_one_process_and_goes_on(parts, stage_and_whole, tmp_path):
    """Where deepspeed is installed (it is not among the requirements)."""
    pytest.importorskip("deepspeed")
    stage, one = stage_and_whole
    out = tmp_path / "out"
    assert run(parts, stage, 2, out, ZERO2, patch=stop_after_two) == [143, 143], out.with_suffix(".log").read_text()
    assert steps_saved(out) == [2] and (out / "checkpoints/deepspeed/step_2").is_dir()
    assert run(parts, stage, 2, out, ZERO2) == [0, 0], out.with_suffix(".log").read_text()
    wanted, got = ([line["loss"] for line in lines_of(folder) if "lr" in line] for folder in (one, out))
    assert got == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    first, second = (load_file(folder / "model.safetensors") for folder in (one, out))
    assert max((first[name] - second[name]).abs().max() for name in first) < 1e-3


def launch(launcher: list[str], given: dict, log: Path, on_cpu: str = "true") -> subprocess.Popen:
    """The script under a launcher, with two processes on a CPU; a session of its own."""
    command = [sys.executable, "-m", *launcher, str(ROOT / "training/pretrain_stage2.py"), *flags(given)]
    environment = os.environ | {"ACCELERATE_USE_CPU": on_cpu, "OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


def accelerate_launch(config: str) -> list[str]:
    file = str(ROOT / f"training/configs/accelerate/{config}.yaml")
    port = str(free_port())
    return ["accelerate.commands.launch", "--config_file", file, "--num_processes", "2", "--main_process_port", port]


def torchrun() -> list[str]:
    return ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]


def wait_or_kill(process: subprocess.Popen, log: Path, seconds: float = PATIENCE) -> int:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"it hangs:\n{log.read_text()[-3000:]}")


@pytest.mark.parametrize("config", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_an_error_in_one_process_ends_the_run_and_is_on_the_screen(parts, tmp_path, config):
    """A broken image, which one of the processes meets, under accelerate launch with the shipped config."""
    rows = [{"image": str(parts / f"data/train/{number}.png"), "captions": "a square"} for number in range(8)]
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows[3]["image"] = str(tmp_path / "broken.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = fields(parts, 2, 2, tmp_path / "out") | {"dataset": tmp_path / "rows.jsonl", "max_steps": 1000}
    given = {name: value for name, value in given.items() if not name.startswith("eval")}
    process = launch(accelerate_launch(config), given, tmp_path / "log")
    assert wait_or_kill(process, tmp_path / "log") != 0
    assert "error: Too many rows cannot be used" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run(parts, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    process = launch(torchrun(), fields(parts, 2, 2, out) | {"max_steps": 100_000, "eval_steps": 50_000}, log)
    until(lambda: steps_logged(out) >= 3 or process.poll() is not None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    assert wait_or_kill(process, log) != 0
    assert "Signal 9 (SIGKILL) received" in log.read_text()


@pytest.mark.slow
def test_a_launcher_that_may_restart_brings_all_back(parts, tmp_path):
    """`torchrun --max_restarts`: after a process is lost, all go on from the last checkpoint, to the end."""
    out, log = tmp_path / "out", tmp_path / "log"
    given = fields(parts, 2, 2, out) | {"max_steps": 300, "eval_steps": 300, "save_steps": 5}
    process = launch([*torchrun(), "--max_restarts", "1"], given, log)
    until(lambda: steps_saved(out) or process.poll() is not None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    assert wait_or_kill(process, log) == 0, log.read_text()[-3000:]
    assert json.loads((out / "finished.json").read_text())["steps"] == 300
    logged = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert logged == sorted(logged) and logged[-1] == 300


@pytest.mark.slow
def test_stopping_the_launcher_saves(parts, tmp_path):
    """SIGTERM to torchrun, as a batch system sends it."""
    out, log = tmp_path / "out", tmp_path / "log"
    process = launch(torchrun(), fields(parts, 2, 2, out) | {"max_steps": 100_000, "eval_steps": 50_000}, log)
    until(lambda: steps_logged(out) >= 3 or process.poll() is not None)
    process.terminate()
    assert wait_or_kill(process, log) != 0
    assert "saved. The same command continues." in log.read_text() and len(steps_saved(out)) >= 1


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs they do")
def test_processes_that_do_not_find_one_another_are_an_error(parts, tmp_path):
    """Without a GPU and without ACCELERATE_USE_CPU, accelerate lets each of two processes run by itself."""
    out, log = tmp_path / "out", tmp_path / "log"
    process = launch(accelerate_launch("ddp"), fields(parts, 2, 2, out), log, on_cpu="false")
    assert wait_or_kill(process, log) != 0
    assert "2 processes were started, but there is no GPU" in log.read_text() and not out.exists()
