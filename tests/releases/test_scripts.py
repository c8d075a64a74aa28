"""Each training script, as a user starts it: `python training/SCRIPT.py`, a short run on generated data.

The other tests call the scripts inside their own process, with what a test module has imported and patched before.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoModelForPreTraining, AutoProcessor

from tests.helpers.evaluation_parts import CAPTIONS, coco_file, make_photos
from tests.helpers.processes import STAGE1, flags
from tests.helpers.training_parts import make_image_folder, make_language_model, make_vision_model

pytestmark = pytest.mark.releases
TRAINING = Path(__file__).parents[2] / "training"
STEPS = 30
STAGE2 = {
    "text_column": "captions",
    "per_device_train_batch_size": 4,
    "warmup_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "report_to": "none",
    "max_steps": STEPS,
}


def run(script: str, **fields) -> str:
    """What the script prints."""
    command = [sys.executable, str(TRAINING / f"{script}.py"), *flags(fields)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def assert_learns(out: Path) -> None:
    """The mean loss of the last five steps is below that of the first five."""
    seen = losses(out)
    assert len(seen) == STEPS and all(map(math.isfinite, seen))
    assert sum(seen[-5:]) < sum(seen[:5]), seen


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """data/, tower/ and llm/."""
    root = tmp_path_factory.mktemp("scripts")
    make_image_folder(root / "data", {"train": 20, "validation": 6})
    make_vision_model(root / "tower")
    make_language_model(root / "llm", "opt")
    return root


def pretrain_stage1(parts: Path, out: Path, **fields) -> Path:
    given = {"dataset": parts / "data", "vision_model": parts / "tower", "output_dir": out, "max_steps": STEPS}
    run("pretrain_stage1", **{**STAGE1, "eval_split": "validation", "augment": False, **given, **fields})
    return out


@pytest.fixture(scope="module")
def stage1(parts) -> Path:
    return pretrain_stage1(parts, parts / "stage1")


@pytest.fixture(scope="module")
def stage2(parts, stage1) -> Path:
    given = {"dataset": parts / "data", "language_model": parts / "llm", "init_from": stage1}
    run("pretrain_stage2", **STAGE2, **given, output_dir=parts / "stage2", prompt="a photo of")
    return parts / "stage2"


def test_pretrain_stage1(stage1):
    assert_learns(stage1)
    model = AutoModelForPreTraining.from_pretrained(stage1)
    for name, tensor in load_file(stage1 / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_cache_features(parts, stage1):
    cache = parts / "cache"
    run("cache_features", dataset=parts / "data", vision_model=parts / "tower", output_dir=cache, dtype="float32")
    cached = losses(pretrain_stage1(parts, parts / "cached", feature_cache=cache))
    assert cached == pytest.approx(losses(stage1), abs=1e-4)


def test_pretrain_stage2(stage2):
    assert_learns(stage2)


def test_finetune(parts, stage2):
    given = {"dataset": parts / "data", "init_from": stage2, "output_dir": parts / "tuned", "lora": "lm"}
    run("finetune", **STAGE2, **given, task="caption", train_vision=False)
    assert_learns(parts / "tuned")


def test_bootstrap_captions(parts, stage1):
    out = parts / "bootstrapped"
    given = {"dataset": parts / "data", "text_column": "captions", "captioner": stage1, "output_dir": out}
    run("bootstrap_captions", **given, num_captions=3, max_new_tokens=6, keep=2)
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert len({row["image"] for row in rows}) == 20
    for row in rows:
        assert len(set(row["captions"])) == 2 and row["scores"] == sorted(row["scores"], reverse=True)


def test_run_evaluation(parts, stage2, tmp_path):
    """The captions are those of the checkpoint, and the table has their scores."""
    photos, data = make_photos(tmp_path / "photos"), coco_file(tmp_path / "captions.json")
    given = {"task": "caption", "split": "all", "model": stage2, "data": data, "image_folder": photos}
    out = tmp_path / "scores"
    printed = run("run_evaluation", **given, output_dir=out, max_new_tokens=6, num_beams=2, java_metrics=False)
    scores = json.loads((out / "metrics.json").read_text())["metrics"]
    assert f"{scores['CIDEr']:.1f}" in printed
    model, processor = AutoModelForImageTextToText.from_pretrained(stage2).eval(), AutoProcessor.from_pretrained(stage2)
    for record, number in zip(json.loads((out / "predictions.json").read_text()), CAPTIONS, strict=True):
        inputs = processor(images=Image.open(photos / f"{number:012d}.jpg"), text="a photo of", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=6, min_new_tokens=1, num_beams=2, do_sample=False)
        assert record["prediction"] == processor.batch_decode_new(ids, inputs["input_ids"])[0]
    assert (out / "report.html").stat().st_size > 10_000
