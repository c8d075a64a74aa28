"""Eighteen hundred broken inputs: each is used, or refused in a sentence; 300 more are requests, in
tests/space/test_space_fuzz.py. Slow; run by make test-slow."""

import json
import shutil

import pytest
import yaml

from blip2x_training.arguments.parsing import parse_arguments
from blip2x_training.arguments.pretraining import Stage1Arguments
from blip2x_training.data.caption_dataset import CaptionDataset
from blip2x_training.data.formats import image_start, load_rows
from modeling_blip2x.convert import convert
from tests.helpers.mutations import broken_bytes, broken_json, outcomes
from tests.helpers.official_checkpoints import golden_config, write_official
from tests.helpers.training_parts import make_image_folder, make_tars, make_vision_model, run_stage1

pytestmark = pytest.mark.slow


def use_all(dataset: str, text_column: str | None) -> None:
    """What a run does with a data set: rows, texts, and every image."""
    rows = load_rows(dataset, "train")
    data = CaptionDataset(rows, text_column=text_column, folder=image_start(dataset, None))
    for index in range(len(data)):
        data[0, index]


def check(count, attempt, fewest):
    sentences, others = outcomes(count, 0, attempt)
    assert not others, f"{len(others)} of {count}, among them:\n" + "\n".join(others[:10])
    assert sentences >= fewest, f"only {sentences} of {count} were refused: the inputs were hardly broken"


def test_run_configs(tmp_path):
    fields = {"dataset": ["data"], "vision_model": "tower", "output_dir": "out", "learning_rate": 1e-4, "max_steps": 10}
    fields |= {"qformer_config": {"hidden_size": 48}, "bf16": True, "objectives": ["itc", "itm"], "eval_split": None}
    text = yaml.safe_dump(fields)
    path = tmp_path / "run.yaml"

    def attempt(random_):
        if random_.random() < 0.5:
            path.write_bytes(broken_bytes(text.encode(), random_))
        else:
            path.write_text(json.dumps(broken_json(fields, random_)), encoding="utf-8")
        parse_arguments(Stage1Arguments, ["--config", str(path)])

    check(300, attempt, 100)


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.json"])
def test_json(name, tmp_path):
    folder = make_image_folder(tmp_path / "data", {"train": 6}) / "train"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    images = [{"id": n, "file_name": row["file_name"]} for n, row in enumerate(rows)]
    notes = [{"image_id": n, "caption": text} for n, row in enumerate(rows) for text in row["captions"]]
    coco = {"images": images, "annotations": notes}
    (folder / "metadata.jsonl").unlink()
    path = folder / name.replace("metadata", "rows")

    def attempt(random_):
        if name == "captions.json":
            text = json.dumps(broken_json(coco, random_))
        else:
            text = "\n".join(json.dumps(broken_json(row, random_) if random_.random() < 0.5 else row) for row in rows)
        content = text.encode() if random_.random() < 0.7 else broken_bytes(text.encode(), random_)
        path.write_bytes(content)
        use_all(str(path), None)

    check(200, attempt, 30)


def test_tars(tmp_path):
    content = open(make_tars(tmp_path / "whole", [6])[0], "rb").read()
    path = tmp_path / "broken.tar"

    def attempt(random_):
        path.write_bytes(broken_bytes(content, random_))
        use_all(str(path), None)

    check(300, attempt, 10)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_checkpoint_files(suffix, tmp_path):
    write_official("stage1", tmp_path / f"whole{suffix}")
    content = (tmp_path / f"whole{suffix}").read_bytes()
    path, out, config = tmp_path / f"broken{suffix}", tmp_path / "out", golden_config("stage1")

    def attempt(random_):
        path.write_bytes(broken_bytes(content, random_))
        convert(str(path), str(out), config=config)
        shutil.rmtree(out)

    check(300, attempt, 100)
    assert not list(tmp_path.glob("*out*")), "something half written is left"


def test_fields_for_the_conversion(tmp_path):
    write_official("stage1", tmp_path / "a.pth")
    out, fields = tmp_path / "out", golden_config("stage1")

    def attempt(random_):
        convert(str(tmp_path / "a.pth"), str(out), config=broken_json(fields, random_))
        shutil.rmtree(out)

    check(100, attempt, 30)


def test_state_of_a_run(tmp_path):
    """What a run finds in its folder when it goes on: its state, lines of metrics, checksums, weights."""
    dataset, tower = make_image_folder(tmp_path / "data", {"train": 8}), make_vision_model(tmp_path / "tower")
    begun = tmp_path / "begun"
    run_stage1(dataset, tower, begun, "--max_steps", "2", "--save_steps", "1")
    files = [path for path in sorted(begun.rglob("*")) if path.is_file() and path.suffix != ".png"]
    files = [path.relative_to(begun) for path in files if "tensorboard" not in path.parts]
    assert {"state.json", "metrics.jsonl", "config.yaml"} <= {path.name for path in files}
    out = tmp_path / "out"

    def attempt(random_):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(begun, out)
        broken = out / random_.choice(files)
        if broken.suffix == ".json" and random_.random() < 0.6:
            broken.write_text(json.dumps(broken_json(json.loads(broken.read_text()), random_)))
        else:
            broken.write_bytes(broken_bytes(broken.read_bytes(), random_))
        run_stage1(dataset, tower, out, "--max_steps", "3", "--save_steps", "1")

    check(100, attempt, 10)
