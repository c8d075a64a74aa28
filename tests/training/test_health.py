"""What a user sees of a run: curves, trackers, warnings."""

import importlib.util
import json

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from blip2x_training import pretrain_stage1
from blip2x_training.reporting.curves import choose_panels, draw_curves, lines_to_draw
from blip2x_training.reporting.health import Watch, mean_cosine, query_similarity
from blip2x_training.reporting.trackers import choose_tracker
from tests.helpers import tiny
from tests.helpers.processes import flags, make_parts


def train_line(step: int, loss_itm: float, accuracy: float) -> dict:
    return {"step": step, "lr": 1e-4, "loss_itm": loss_itm, "itm_accuracy": accuracy}


def test_itm_at_the_constant_predictor_is_told_once_and_after_warm_up_only():
    said = []
    watch = Watch(warmup_steps=100, say=said.append)
    for step in range(1, 150):
        watch.look(train_line(step, 0.636, 0.667))
    assert not said, "within warm-up, or less than a window after it"
    for step in range(150, 400):
        watch.look(train_line(step, 0.636, 0.667))
    assert len(said) == 1 and "--hard_negative_steps" in said[0] and "0.6365" in said[0]


@pytest.mark.parametrize("loss, accuracy", [(0.60, 0.667), (0.636, 0.70), (0.69, 0.5)])
def test_itm_that_learns_is_left_alone(loss, accuracy):
    said = []
    watch = Watch(warmup_steps=0, say=said.append)
    for step in range(10, 500, 10):
        watch.look(train_line(step, loss, accuracy))
    assert not said


def test_collapsed_queries_are_told_once():
    said = []
    watch = Watch(warmup_steps=0, say=said.append)
    for step, similarity in ((1, 0.98), (2, 0.995), (3, 0.999)):
        watch.look({"step": step, "eval_loss": 1.0, "query_similarity": similarity})
    assert len(said) == 1 and said[0].startswith("warning: Step 2: the queries have collapsed")


def test_similarity_is_exact_under_autocast():
    """bfloat16 would make 1.0000 of .9990, and collapse of what is none."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 1, 64, generator=generator) + 0.05 * torch.randn(2, 4, 64, generator=generator)
    expected = mean_cosine(queries)
    with torch.autocast("cpu", torch.bfloat16):
        assert mean_cosine(queries) == expected and 0.99 < expected < 0.999


def test_query_similarity_is_that_of_the_outputs_of_the_first_batch():
    model = tiny.stage1().eval()
    batch = tiny.batch()
    with query_similarity(model) as figures, torch.no_grad():
        model(**batch)
        model(**tiny.batch(seed=1))
    queries = model.model(pixel_values=batch["pixel_values"]).last_hidden_state
    first, second = torch.nn.functional.normalize(queries, dim=-1)[:, :, None], queries[:, None]
    cosines = torch.nn.functional.cosine_similarity(first, second, dim=-1)
    apart = ~torch.eye(tiny.QUERIES, dtype=torch.bool)
    assert figures["query_similarity"] == pytest.approx(cosines[:, apart].mean().item(), abs=1e-5)
    assert mean_cosine(queries[:, :1].expand(-1, 4, -1)) == pytest.approx(1.0, abs=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A stage 1, validated twice, with the default tracker."""
    root = tmp_path_factory.mktemp("watched")
    fields = make_parts(root) | {"max_steps": 4, "save_steps": 4, "eval_split": "validation", "eval_steps": 2}
    fields |= {"output_dir": root / "out", "dataloader_num_workers": 0}
    del fields["report_to"]
    pretrain_stage1.main(flags(fields))
    return root / "out"


def test_curves_are_drawn(run):
    with Image.open(run / "curves.png") as picture:
        colours = len(picture.convert("RGB").getcolors(2**24))
        assert picture.width > 900 and picture.height > 700 and colours > 50
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    panels = dict(choose_panels(lines))
    assert panels["training losses"] == ["loss", "loss_itc", "loss_itm", "loss_itg"]
    assert panels["validation losses"] == ["eval_loss", "eval_loss_itc", "eval_loss_itm", "eval_loss_itg"]
    assert "query_similarity" in panels["accuracies, query similarity, temperature"] and panels["learning rate"] == [
        "lr"
    ]
    assert 0 < lines[-1]["query_similarity"] <= 1


def test_curves_of_a_long_run_are_thinned_and_keep_every_validation():
    lines = [json.dumps({"step": step, "loss": 1.0, "lr": 1e-4}).encode() for step in range(1, 10_002)]
    validated = [json.dumps({"step": step, "eval_loss": 1.0}).encode() for step in (1, 5000, 10_001)]
    kept = lines_to_draw(sorted([*lines, *validated], key=lambda line: json.loads(line)["step"]))
    steps = [json.loads(line)["step"] for line in kept if b"lr" in line]
    assert [line for line in kept if b"lr" not in line] == validated
    assert 1500 < len(steps) <= 2000 and steps[-1] == 10_001 and len({b - a for a, b in zip(steps, steps[1:])}) == 1
    assert lines_to_draw(lines[:2000]) == lines[:2000]


def test_curves_of_nothing_are_no_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_tensorboard_gets_the_losses(run):
    # The fields of the run are in a file of their own.
    readers = [EventAccumulator(str(events)).Reload() for events in run.glob("tensorboard/**/events.out.tfevents.*")]
    (reader,) = (reader for reader in readers if "loss_itc" in reader.Tags()["scalars"])
    assert [event.step for event in reader.Scalars("loss_itc")] == [1, 2, 3, 4]
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss_itc"]
    assert reader.Scalars("loss_itc")[0].value == pytest.approx(logged)


def test_trackers_are_checked(monkeypatch):
    assert choose_tracker("none") == (None, None)
    with pytest.raises(ValueError, match="--report_to is 'tensorbord'; choose from none, .*tensorboard.*wandb"):
        choose_tracker("tensorbord")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--report_to is wandb, which is not installed. Run: pip install wandb"):
        choose_tracker("wandb")
    assert choose_tracker(None)[0] is None and "pip install tensorboard" in choose_tracker(None)[1]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choose_tracker(None) == ("tensorboard", None)
