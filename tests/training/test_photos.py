"""photos.py end to end at a size where it learns nothing but every part runs; the plan; the time that is left."""

import json
from dataclasses import asdict

import pytest
from transformers import AutoModel, AutoModelForImageTextToText

from blip2x_training import photos
from blip2x_training.photo_run.plan import Plan, choose_splits, make_plan
from blip2x_training.photo_run.time_left import Progress, duration
from tests.helpers.training_parts import make_image_folder, make_language_model, make_vision_model

SPLITS = ("train", "validation")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    dataset = make_image_folder(folder / "data", {"train": 20})
    tower, language = make_vision_model(folder / "tower"), make_language_model(folder / "language", "opt")
    return {"dataset": dataset, "vision_model": tower, "language_model": language, "output_dir": folder / "run"}


def flags(parts, **changes):
    return [word for name, value in (parts | changes).items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def finished(parts):
    argv = flags(parts, stage1_steps=2, stage2_steps=2, bf16=False)
    photos.main(argv)
    return argv, parts["output_dir"]


def test_one_command_makes_models_figures_and_a_report(finished):
    _, output = finished
    for stage, steps in ((1, 2), (2, 2)):
        lines = [json.loads(line) for line in (output / f"stage{stage}" / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == steps and "eval_loss" in lines[-1]
    AutoModel.from_pretrained(output / "stage1")
    AutoModelForImageTextToText.from_pretrained(output / "stage2")
    scored = {
        name: json.loads((output / "evaluation" / name / "metrics.json").read_text())
        for name in ("retrieval", "stage1_captions", "stage2_captions")
    }
    assert all(summary["counts"]["scored"] == 2 for summary in scored.values()), "a tenth of 20 is held out"
    assert scored["stage2_captions"]["protocol"]["prompt"] == "'a photo of'"
    page = (output / "report.html").read_text()
    for name in scored:
        assert f"evaluation/{name}/report.html" in page and (output / "evaluation" / name / "report.html").exists()
    records = json.loads((output / "evaluation" / "stage2_captions" / "predictions.json").read_text())
    assert page.count("<article") == 2 and all(record["references"][0] in page for record in records)
    assert page.count("data:image/png;base64,") == 2, "the curves of both stages"
    assert "18 photos show that everything works" in page and "python training/pretrain_stage1.py --config" in page


def test_the_same_command_again_does_nothing_anew(finished, capsys):
    argv, output = finished
    made = {path: path.stat().st_mtime_ns for path in output.glob("*/*.safetensors")}
    times = (output / "times.json").read_text()
    capsys.readouterr()
    photos.main(argv)
    printed = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.glob("*/*.safetensors")} == made
    assert (output / "times.json").read_text() == times
    assert "stage1 is finished: 2 steps" in printed and "with what comes after it" not in printed


def test_a_folder_of_other_arguments_is_refused(finished, parts):
    with pytest.raises(ValueError, match="was made with --seed 42, not 7"):
        photos.main(flags(parts, stage1_steps=2, stage2_steps=2, bf16=False, seed=7))
    with pytest.raises(ValueError, match="--dataset is ./nowhere: there is no such file"):
        photos.main(flags(parts, dataset="./nowhere"))


def test_a_validation_split_is_taken_where_there_is_one(parts, tmp_path):
    assert choose_splits(str(parts["dataset"]), None, "train", None) == ("train[:90%]", "train[90%:]")
    assert choose_splits(str(parts["dataset"]), None, "train", "dev") == ("train", "dev")
    both = make_image_folder(tmp_path / "both", {"train": 4, "validation": 2})
    assert choose_splits(str(both), None, "train", None) == SPLITS
    with pytest.raises(ValueError, match="no validation split. Name one: --eval_split"):
        choose_splits(str(parts["dataset"]), None, "train[:10]", None)


def test_the_plan_follows_from_the_size_of_the_data():
    large = make_plan(SPLITS, 6000, 30_000, 1000, (None, None))
    assert (large.stage1.batch, large.stage2.batch, large.views) == (64, 32, 4)
    assert large.stage1.steps == round(5 * 30_000 / 64) and "docs/photos.md" in large.expectation
    huge = make_plan(SPLITS, 10**6, 5 * 10**6, 1000, (None, None))
    assert huge.stage1.steps == 2400 and huge.views == 1, "an hour, and no terabyte of views"
    small = make_plan(SPLITS, 45, 45, 5, (None, 7))
    assert (small.stage1.batch, small.stage1.steps, small.stage2.steps) == (22, 300, 7)
    assert "45 photos show that everything works, and little more" in small.expectation
    assert Plan.read(json.loads(json.dumps(asdict(small)))) == small


def test_the_time_that_is_left_follows_the_pace_of_what_is_done(tmp_path, capsys):
    progress = Progress({"a": 10.0, "b": 100.0, "c": 1000.0}, tmp_path / "times.json")
    progress.took, progress.ended = {"a": 30.0}, ["a"]
    progress.run("b", lambda: None)
    assert "[2 of 3] b: about 5 min; with what comes after it: about 55 min" in capsys.readouterr().out
    assert progress.ended == ["a", "b"]
    with pytest.raises(KeyboardInterrupt):
        progress.run("c", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    again = Progress(progress.expected, tmp_path / "times.json")
    assert again.ended == ["a", "b"] and again.took["a"] == 30.0 and 0 < again.took["c"] < 30
    assert [duration(seconds) for seconds in (40, 600, 7500)] == ["40 s", "10 min", "2 h 05 min"]
