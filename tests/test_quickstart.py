"""The embedded default end to end, at a size where it learns nothing but every part runs."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from quickstart import Budget, run_quickstart
from toy_report import misses, table
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

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


def test_every_figure_is_reported(finished):
    output_dir, results = finished
    assert set(results) == {"full", "no stage 1", "no ITG"}
    for split in ("test_new", "test_held_out"):
        assert {"caption", "vqa", "blind", "vqa_exists", "blind_exists", "itc", "itm"} <= set(results["full"][split])
        assert "itc" not in results["no stage 1"][split]
    assert json.loads((output_dir / "results.json").read_text())["full"] == results["full"]
    assert "no ITG" in table(results) and "blind" in table(results)
    assert (output_dir / "report.png").stat().st_size > 10_000
    assert len(json.loads((output_dir / "shown" / "shown.json").read_text())) == 8


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


def test_misses_name_the_aims(finished):
    missed = misses(finished[1]["full"])
    assert any(text.startswith("caption exact match, new scenes") for text in missed)
