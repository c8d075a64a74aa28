"""Training scripts as processes of their own, forked from a server that has imported torch and the scripts once."""

import contextlib
import importlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from blip2x_training.system.commands import run_command
from tests.helpers.training_parts import make_image_folder, make_vision_model

# The server looks for what it preloads where PYTHONPATH says, and passes silently over what it does not find.
ROOT = Path(__file__).parents[2]
FOLDERS = [str(ROOT), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, FOLDERS))
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.helpers.training_imports"])

PATIENCE = 600  # seconds after which something hangs: a busy machine is slow, and no test depends on how slow

STAGE1 = {  # dropout, random crops, drawn captions; two loader workers and two forwards a step
    "text_column": "captions",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "dataloader_num_workers": 2,
    "warmup_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "num_query_tokens": 4,
    "image_text_hidden_size": 16,
    "min_word_count": 1,
    "rerank_k": 0,
    "report_to": "none",
    "qformer_config": json.dumps(
        {
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "max_position_embeddings": 64,
        }
    ),
}


def make_parts(root: Path, rows: int = 20) -> dict:
    """Fields of a stage 1 on a new image folder and tower below `root`."""
    make_image_folder(root / "data", {"train": rows, "validation": 6})
    make_vision_model(root / "tower")
    return {**STAGE1, "dataset": root / "data", "vision_model": root / "tower"}


def flags(fields: dict) -> list[str]:
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def main(script: str, argv: list[str], output: Path, environment: dict[str, str], patch: Callable | None) -> None:
    """The process: as `python SCRIPT ARGV`, in a process group of its own, its output in a file."""
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # as in a script; here loader workers would inherit forkserver
    os.environ |= environment
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    if patch is not None:
        patch()
    try:
        run_command(lambda: importlib.import_module(f"blip2x_training.{script}").main(argv))
    finally:
        with contextlib.suppress(ValueError):
            sys.stdout.flush()


@contextlib.contextmanager
def full_disk(size: int):
    """No file of this process can grow beyond so many bytes: the system refuses the write, as on a disk without space."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Script:
    """A running script, with one process or several."""

    def __init__(
        self,
        fields: dict,
        output: Path,
        processes: int = 1,
        script: str = "pretrain_stage1",
        patch: Callable | None = None,
        environment: dict[str, str] | None = None,
    ):
        self.output = output
        output.parent.mkdir(parents=True, exist_ok=True)
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        self.processes = []
        for rank in range(processes):
            ranks = {**address, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
            given = {"ACCELERATE_USE_CPU": "true"} | (ranks if processes > 1 else {}) | (environment or {})
            process = context.Process(target=main, args=(script, flags(fields), output, given, patch))
            process.start()
            self.processes.append(process)

    def wait(self, timeout: float = PATIENCE) -> list[int]:
        """Exit codes; a negative one is the number of a signal."""
        for process in self.processes:
            process.join(timeout)
            assert process.exitcode is not None, f"still running after {timeout} s:\n{self.text()}"
        return [process.exitcode for process in self.processes]

    def wait_for_step(self, out: Path, step: int) -> None:
        """Until metrics.jsonl has the line of a step, in a run without validations; fails if the script ends before."""
        until(lambda: steps_logged(out) >= step or self.processes[0].exitcode is not None)
        assert steps_logged(out) >= step, self.text()

    def send(self, number: int, rank: int = 0, group: bool = False) -> None:
        pid = self.processes[rank].pid
        os.killpg(pid, number) if group else os.kill(pid, number)

    def kill(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):  # its loader workers too, where it has got that far
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


def until(condition: Callable[[], bool], timeout: float = PATIENCE, pause: float = 0.01) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(pause)


def steps_logged(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0
