"""A Space with tiny random models on loopback, as `python space_app/app.py` starts it."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import models as space_models
import torch
from PIL import Image

from tests.helpers.tiny import stage1, stage1_processor, stage2, stage2_processor

ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "space_app"
EXAMPLES = sorted((SPACE / "examples").glob("*.png"))
TEXTS = ["a red circle", "a blue dog on the square", "two"]
NEVER = threading.Event()  # of work that nobody stops
# Seconds after which anything that is waited for counts as broken. A machine may be as busy as it likes: nothing is measured.
WAIT = 600


def liven_scores(model: torch.nn.Module) -> torch.nn.Module:
    """Wider matrices outside the tower: at the usual 0.02 a tiny model gives all pictures and texts the same score."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "vision_model" not in name:
                parameter.normal_(0, 0.3)
    return model


def save_tiny(folder: Path) -> tuple[Path, Path]:
    """Folders of a stage-2 and a stage-1 checkpoint whose outputs depend on picture and text."""
    processor = stage2_processor()
    speaker = stage2("opt", std=0.5, image_token_index=processor.image_token_id)
    speaker.generation_config.suppress_tokens = [processor.image_token_id]
    speaker.save_pretrained(folder / "stage2")
    processor.save_pretrained(folder / "stage2")
    processor = stage1_processor()
    tokenizer = processor.tokenizer
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.sep_token_id}
    liven_scores(stage1(qformer=ids)).save_pretrained(folder / "stage1")
    processor.save_pretrained(folder / "stage1")
    return folder / "stage2", folder / "stage1"


def until(condition: Callable[[], object]) -> None:
    """Returns once the condition holds."""
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, f"waited for {WAIT} seconds in vain"
        time.sleep(0.1)


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without what would steer the app or Gradio, so that it is the same on every machine."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BLIP2X_", "GRADIO_"))}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


@contextmanager
def serving(
    *options: str,
    script: Path = SPACE / "app.py",
    env: dict | None = None,
    log: Path | None = None,
    cwd: Path | None = None,
    python: str | Path = sys.executable,
):
    """Address and process of an app.py that runs until the block is left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(python), str(script), *map(str, options), "--host", "127.0.0.1", "--port", str(port)]
    output = open(log or os.devnull, "w")
    process = subprocess.Popen(
        command, env=env or clean_environment(), stdout=output, stderr=subprocess.STDOUT, cwd=cwd
    )
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"app.py ended with {process.returncode}: {Path(log).read_text() if log else ''}")
        try:
            return bool(urllib.request.urlopen(f"{address}/config", timeout=WAIT).read())
        except OSError:
            return False

    try:
        until(answers)
        yield address, process
    finally:
        process.terminate()
        process.wait(timeout=WAIT)
        output.close()


def copy_of_the_app(folder: Path) -> Path:
    """The app's folder alone, as on a Space: nothing lies beside it."""
    return Path(shutil.copytree(SPACE, folder / "space", ignore=shutil.ignore_patterns("__pycache__")))


def hold_first_generation(
    class_, held: Callable[[], object] = lambda: None, freed: Callable[[], object] = lambda: None
) -> Callable:
    """A __call__ for work.StopWhenTold: the first generation of a request ends, after its fifth token, only when it is told
    to stop. (The examples' captions, made before the page is there, are written in the main thread.)

    held: called when it has come to its fifth token. freed: when it has been told to stop.
    """
    told, tokens, first = class_.__call__, [], []

    def call(self, *arguments, **named):
        if threading.current_thread() is not threading.main_thread() and not first:
            first.append(self)
        if self in first:
            tokens.append(1)
            if len(tokens) == 5:
                held()
                assert self.stop.wait(WAIT), "nobody told the generation to stop"
                freed()
        return told(self, *arguments, **named)

    return call


def held_app(folder: Path) -> Path:
    """A script that runs the app with `hold_first_generation`; the files `held` and `freed` beside it appear when it is."""
    script = folder / "held_app.py"
    paths = [str(SPACE), str(Path(__file__).parents[2])]
    script.write_text(
        f"import pathlib, sys; sys.path[:0] = {paths!r}; sys.argv[0] = 'app.py'\n"
        "import app, work\n"
        "from tests.helpers import space_server\n"
        "marks = [pathlib.Path(__file__).with_name(name).touch for name in ('held', 'freed')]\n"
        "work.StopWhenTold.__call__ = space_server.hold_first_generation(work.StopWhenTold, *marks)\n"
        "app.main()\n"
    )
    return script


def load_tiny(folder: Path) -> space_models.Models:
    """Both tiny checkpoints, as the Space loads them."""
    return space_models.load_models([str(saved) for saved in save_tiny(folder)], "cpu")


def noise_pictures() -> list[Image.Image]:
    """Three coarse pictures of 40 x 40, the same each time."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
    return [Image.fromarray(values).resize((40, 40)) for values in pixels]
