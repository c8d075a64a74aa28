"""The embedded default end to end, at a size where it learns nothing but every part runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from blip2x_training.data.formats import load_rows
from blip2x_training.quickstart import Budget, run_quickstart
from blip2x_training.toy.scenes import QUESTION_TYPES
from blip2x_training.toy.summary import misses, table, write_picture

TINY = Budget(
    split_sizes={"train": 40, "test_new": 12, "test_held_out": 12},
    vision_steps=2,
    language_steps=2,
    stage1_steps=2,
    stage2_steps=2,
    pictures=96,
    text_scenes=60,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("quickstart") / "run"
    return output_dir, run_quickstart(output_dir, 0, ablations=True, budget=TINY)


def test_figures_are_those_of_the_checkpoints_one_question_at_a_time(finished):
    output_dir, results = finished
    assert json.loads((output_dir / "results.json").read_text()) == results
    assert set(results) == {"full", "no stage 1", "no ITG"} and "itc" not in results["no stage 1"]["test_held_out"]
    model = AutoModelForImageTextToText.from_pretrained(output_dir / "stage2").eval()
    processor = AutoProcessor.from_pretrained(output_dir / "stage2")
    rows = load_rows(str(output_dir / "scenes"), "test_held_out")
    right = {}
    for row in rows:
        for kind, prompt, truth in zip(row["type"], row["prompt"], row["text"]):
            if kind != "caption":
                inputs = processor(images=row["image"].convert("RGB"), text=prompt, return_tensors="pt")
                ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
                right.setdefault(kind, []).append(processor.batch_decode_new(ids, inputs["input_ids"])[0] == truth)
    found, answers = results["full"]["test_held_out"], [one for kind in right.values() for one in kind]
    assert found["vqa"] == pytest.approx(sum(answers) / len(answers)) and 0 < sum(answers) < len(answers)
    for kind, answers in right.items():
        assert found[f"vqa_{kind}"] == pytest.approx(sum(answers) / len(answers)), kind


def test_ablations_leave_out_what_they_say(finished):
    output_dir, results = finished
    objectives = {
        name: AutoConfig.from_pretrained(output_dir / name).objectives for name in ("stage1", "stage1_without_itg")
    }
    assert objectives == {"stage1": ["itc", "itm", "itg"], "stage1_without_itg": ["itc", "itm"]}
    lines = table(results).splitlines()
    for name in ("no stage 1", "no ITG"):
        shown = lines[lines.index(name) + 2]  # the second figure of each
        vqa = [f"{results[name][split]['vqa']:.3f}" for split in ("test_new", "test_held_out")]
        assert shown.split()[:2] == ["VQA", "accuracy"] and shown.split()[2:] == vqa


def test_a_fresh_process_writes_what_this_one_does(finished):
    output_dir, _ = finished
    shown = json.loads((output_dir / "shown" / "shown.json").read_text())
    rows = load_rows(str(output_dir / "scenes"), "test_held_out").select(range(8))
    assert [item["true_caption"] for item in shown] == rows["caption"][:]
    model = AutoModelForImageTextToText.from_pretrained(output_dir / "stage2").eval()
    processor = AutoProcessor.from_pretrained(output_dir / "stage2")
    for item, row in zip(shown, rows, strict=True):
        image = row["image"].convert("RGB")
        assert Image.open(item["image"]).tobytes() == image.tobytes()
        inputs = processor(images=image, text=row["prompt"][0], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        assert item["caption"] == processor.batch_decode_new(ids, inputs["input_ids"])[0] != ""


def test_the_report_shows_scenes_answers_and_losses(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    colours = np.random.default_rng(0).integers(0, 256, (2, 3), dtype=np.uint8)
    shown = []
    for number, (caption, answer) in enumerate((("a red ring", "red"), ("a blue ring", "blue"))):
        Image.new("RGB", (48, 48), tuple(colours[number].tolist())).save(tmp_path / f"{number}.png")
        answers = [["what color?", answer, "red"]]
        item = {"image": str(tmp_path / f"{number}.png"), "caption": caption, "true_caption": "a red ring"}
        shown.append(item | {"answers": answers})
    steps = [
        {"step": 1, "loss": 3.0, "loss_itm": 0.7},
        {"step": 1, "eval_loss": 9.0},
        {"step": 2, "loss": 2.5, "loss_itm": 0.6},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
    curves = {"vision tower": tmp_path / "metrics.jsonl", "stage 1": tmp_path / "metrics.jsonl"}
    assert Image.open(write_picture(tmp_path, shown, curves)).size == (1600, 1400)
    axes = drawn[0].axes
    assert [axis.get_title() for axis in axes if axis.images] == [
        "a red ring\nwhat color? red",
        "a blue ring\n(wrong: a red ring)\nwhat color? blue (wrong: red)",
    ]
    for axis, colour in zip((axis for axis in axes if axis.images), colours, strict=True):
        assert (axis.images[0].get_array()[..., :3] * 255).round().reshape(-1, 3).tolist() == [
            colour.tolist()
        ] * 48 * 48
    curve = axes[-1]
    assert curve.get_title() == "stage 1"
    assert [(line.get_label(), line.get_xydata().tolist()) for line in curve.lines] == [
        ("loss", [[1, 3.0], [2, 2.5]]),
        ("loss_itm", [[1, 0.7], [2, 0.6]]),
    ]


def test_each_stage_gets_a_card_with_the_figures_of_this_run(finished):
    output_dir, results = finished
    for stage in ("stage1", "stage2"):
        card = ModelCard.load(output_dir / stage / "README.md")
        assert f"```\n{table(results)}\n```" in card.text and "## Limits" in card.text
        assert card.data.license == "apache-2.0" and card.data.to_dict()["demo"] == {
            "prompt": "a picture of",
            "turns": 0,
        }


def test_running_again_continues_and_ends_with_the_command_that_opens_the_demo(finished, capsys):
    output_dir, results = finished
    weights = [path for path in output_dir.rglob("*.safetensors")]
    before = {path: path.stat().st_mtime_ns for path in weights}
    assert len(before) >= 7
    assert run_quickstart(output_dir, 0, budget=TINY) == {"full": results["full"]}
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"space_app/app.py --model {output_dir}")
    assert before == {path: path.stat().st_mtime_ns for path in weights}


def test_another_seed_in_the_same_folder_is_refused(finished):
    with pytest.raises(ValueError, match="made with --seed 0, not 1"):
        run_quickstart(finished[0], 1, budget=TINY)


def test_the_toys_load_as_any_checkpoint_does(finished):
    output_dir: Path = finished[0]
    tower = AutoModel.from_pretrained(output_dir / "vision_tower").eval()
    assert tower(torch.zeros(1, 3, 48, 48)).last_hidden_state.shape == (1, 64, 6, 6)
    tokenizer = AutoTokenizer.from_pretrained(output_dir / "language_model")
    model = AutoModelForCausalLM.from_pretrained(output_dir / "language_model")
    ids = tokenizer("Question: what size is the red ring? Answer:")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
    assert model.config.vocab_size == len(tokenizer)


def test_misses_name_the_aims():
    """Met, they are said to be; each that is not met is named with both numbers, at its own bar for each split."""
    kinds = {f"{name}_{kind}": value for kind in QUESTION_TYPES for name, value in (("vqa", 0.9), ("blind", 0.75))}
    met = {
        "test_new": {"caption": 0.95, "vqa": 0.90, "blind": 0.4, "itc": 0.85, "itm": 0.92} | kinds,
        "test_held_out": {"caption": 0.75, "vqa": 0.85, "blind": 0.4, "itc": 0.70, "itm": 0.88} | kinds,
    }
    assert misses(met) == [] and table({"full": met}).endswith("All aims are met.")
    met["test_new"] |= {"caption": 0.94}
    met["test_held_out"] |= {"itm": 0.879, "blind_count": 0.751}
    assert misses(met) == [
        "caption exact match, new scenes: 0.940 < 0.95",
        "retrieval R@1, re-ranked by ITM, held-out combinations: 0.879 < 0.88",
        "count questions, held-out combinations: only 0.149 above blind",
    ]
    assert table({"full": met}).endswith("Missed: " + "; ".join(misses(met)) + ".")
