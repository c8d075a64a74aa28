"""Blocks of README and docs: Python runs, on tiny models under the names that the pages use; commands are parsed.

A block that is not run has a line before it that says why: <!-- not run: needs the hub -->.
"""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from transformers import BertConfig, BertModel

from blip2x_training.arguments import parsing
from tests.helpers.evaluation_parts import make_stage1, make_stage2
from tests.helpers.pages import PAGES, ROOT, Block, blocks, name_of, prose
from tests.helpers.tiny import bert_tokenizer, image
from tests.helpers.training_parts import make_language_model, make_vision_model

RUN_ELSEWHERE = {"export.md"}  # block by block in the test of exports
LANGUAGES = {"python", "bash", "text", "json"}
TOOLS = ("pytest",)  # of the extra `test`
# Of every script, of ruff, of LAVIS, of accelerate, of torchrun, of SLURM
OTHER_FLAGS = {"--help", "--config", "--check", "--cfg", "--config_file", "--cpu", "--num_cpu_threads_per_process"}
OTHER_FLAGS |= {
    "--num_processes",
    "--num_machines",
    "--machine_rank",
    "--main_process_ip",
    "--node_rank",
    "--max_restarts",
}
OTHER_FLAGS |= {"--requeue", "--signal"}
SOURCES = [
    path
    for folder in ("training", "benchmarks", "space_app", "modeling_blip2x")
    for path in (ROOT / folder).rglob("*.py")
]


class Parsed(BaseException):
    """A command was understood; stops it before it does anything."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """The repository as it is after `make demo`, with tiny models, some of them under the names of large ones."""
    root = tmp_path_factory.mktemp("workspace")
    for name in ("training", "benchmarks", "space_app", "docs", "constraints.txt"):
        (root / name).symlink_to(ROOT / name)
    make_stage1(root / "runs/quickstart/stage1")
    make_stage2(root / "runs/quickstart/stage2", "llama")  # takes texts of any length
    (root / "runs/quickstart/scenes").mkdir()
    (root / "runs/stage1").symlink_to(root / "runs/quickstart/stage1")
    (root / "runs/quickstart/shown").mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        image(colour).save(root / f"runs/quickstart/shown/test_held_out_{number}.png")
    make_vision_model(root / "openai/clip-vit-large-patch14")
    make_language_model(root / "facebook/opt-2.7b", "opt")
    torch.manual_seed(0)
    tokenizer = bert_tokenizer()
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    bert = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape))
    bert.save_pretrained(root / "google-bert/bert-base-uncased")
    tokenizer.save_pretrained(root / "google-bert/bert-base-uncased")
    return root


def test_every_block_names_its_language():
    found = [block for page in PAGES for block in blocks(page)]
    assert len(found) > 50
    assert [(name_of(block.page), block.line) for block in found if block.language not in LANGUAGES] == []


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python") and page.name not in RUN_ELSEWHERE], ids=name_of
)
def test_python_blocks_run_in_their_order(page, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    names = {}
    for block in blocks(page, "python"):
        # The number of the line, for the traceback
        code = compile("\n" * (block.line - 1) + block.text, name_of(page), "exec")
        if block.not_run is None:
            exec(code, names)


def commands(block: Block) -> list[str]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith(("#", ". .venv/bin/activate"))]


COMMANDS = [
    pytest.param(command, id=f"{name_of(page)}: {' '.join(command.split()[:6])}")
    for page in PAGES
    for block in blocks(page, "bash")
    if block.not_run is None
    for command in commands(block)
]


@pytest.mark.filterwarnings("ignore:'modeling_blip2x.convert' found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, workspace, monkeypatch):
    """By the parser of the script itself, as a user starts it."""
    monkeypatch.chdir(workspace)
    words = shlex.split(command)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
        if name == "PYTHONPATH":
            monkeypatch.syspath_prepend(value)
    if words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        assert launched.config_file is None or Path(launched.config_file).exists()
        words = ["python", launched.training_script, *launched.training_script_args]
    if words[0] == "make":
        variables, targets = ([w for w in words[1:] if ("=" in w) == is_variable] for is_variable in (True, False))
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^[\w -]*\b{target}\b[\w -]*:", makefile, re.MULTILINE) for target in targets)
        assert all(f"$({variable.split('=')[0]})" in makefile for variable in variables)
    elif words[0] == "pip":
        extras = re.findall(r"\.\[(\w+)\]", command)
        setup = (ROOT / "setup.py").read_text()
        assert words[1] == "install" and extras and all(f'"{extra}":' in setup for extra in extras)
    elif words[0] in TOOLS:
        assert f'"{words[0]}>=' in (ROOT / "setup.py").read_text()
    else:
        assert words[0] == "python", command
        assert_parses(words[1:], monkeypatch)


def assert_parses(words: list[str], monkeypatch) -> None:
    """Start a script or module, and stop it when it has read its arguments."""
    if any("space" in word for word in words[:2]):
        pytest.importorskip("gradio")
    parse_args, parse_arguments = argparse.ArgumentParser.parse_args, parsing.parse_arguments

    def understood(parse):
        def parse_and_stop(*given, **options):
            parse(*given, **options)
            raise Parsed

        return parse_and_stop

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", understood(parse_args))
    monkeypatch.setattr(parsing, "parse_arguments", understood(parse_arguments))
    is_module = words[0] == "-m"
    monkeypatch.setattr(sys, "argv", words[1:] if is_module else words)
    with pytest.raises(Parsed):
        if is_module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")


@pytest.mark.parametrize(
    "page",
    PAGES,
    ids=name_of,
)
def test_flags_in_the_text_exist(page):
    """`--flag value` in prose and tables is a field or an option of some script."""
    known = set(OTHER_FLAGS)
    for source in SOURCES:
        text = source.read_text(encoding="utf-8")
        known |= {f"--{name}" for name in re.findall(r"^    (\w+): .*? = doc\(", text, re.MULTILINE)}
        known |= set(re.findall(r'add_argument\(\s*"(--\w+)"', text))
    named = {flag for code in re.findall(r"`([^`]+)`", prose(page)) for flag in re.findall(r"(?<!\S)--\w+", code)}
    assert named - known == set()
