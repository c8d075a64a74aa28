"""A run that continues goes on in the same run of wandb, with its fields; a stand-in for wandb notes what it is told."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.processes import PATIENCE, flags, make_parts

WANDB = """
import json, os

def note(kind, content):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps([kind, content]) + "\\n")

class Config:
    def update(self, values, allow_val_change=False):
        note("config", values | {"allow_val_change": allow_val_change})

class Run:
    name = "stand-in"
    def log(self, values, step=None, **others):
        note("log", step)
    def finish(self):
        note("finish", None)

config = Config()

def init(**given):
    note("init", given)
    return Run()
"""


@pytest.fixture
def notes(tmp_path) -> list:
    """What three commands tell wandb: two steps, two more of the same run, and a run that starts over."""
    modules, notes = tmp_path / "modules", tmp_path / "notes"
    (modules / "wandb-0.1.dist-info").mkdir(parents=True)  # accelerate asks for the package, too
    (modules / "wandb-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: wandb\nVersion: 0.1\n")
    (modules / "wandb.py").write_text(WANDB)
    fields = {**make_parts(tmp_path, rows=8), "output_dir": tmp_path / "out", "report_to": "wandb"}
    fields |= {"dataloader_num_workers": 0, "gradient_accumulation_steps": 1}
    commands = [flags({**fields, "max_steps": 2}), flags({**fields, "max_steps": 4, "learning_rate": 2e-3})]
    commands.append(flags({**fields, "max_steps": 1, "overwrite_output_dir": True}))
    code = (
        f"from blip2x_training import pretrain_stage1\nfor command in {commands!r}:\n    pretrain_stage1.main(command)"
    )
    path = os.pathsep.join(filter(None, [str(modules), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "NOTES": str(notes)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=PATIENCE)
    return [json.loads(line) for line in notes.read_text().splitlines()]


def test_the_same_run_goes_on_with_its_fields_and_one_that_starts_over_is_new(notes):
    inits = [content for kind, content in notes if kind == "init"]
    assert len({content["id"] for content in inits[:2]}) == 1 and inits[2]["id"] != inits[0]["id"]
    assert [(content["project"], content["resume"]) for content in inits] == [("out", "allow")] * 3
    configs = [content for kind, content in notes if kind == "config"]
    assert [(config["max_steps"], config["learning_rate"]) for config in configs] == [(2, 1e-3), (4, 2e-3), (1, 1e-3)]
    assert configs[1]["allow_val_change"] and json.loads(configs[0]["qformer_config"])["hidden_size"] == 48
    assert [content for kind, content in notes if kind == "log"] == [1, 2, 3, 4, 1]
    assert [kind for kind, _ in notes].count("finish") == 3
