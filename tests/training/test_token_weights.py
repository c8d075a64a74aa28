"""One global batch, cut into other forwards and over other processes, gives the same losses and gradient."""

import json
from pathlib import Path

import pytest

from blip2x_training import finetune, pretrain_stage1, pretrain_stage2
from tests.helpers.processes import flags
from tests.helpers.ranks import run
from tests.helpers.training_parts import SMALL_QFORMER, make_image_folder, make_language_model, make_vision_model

TEXTS = ("red", "a photo of the red square on the left of this picture", "dog", "a cat , a dog and one blue circle")
LAYOUTS = {"4 x 2": (4, 2), "2 x 4": (2, 4), "1 x 8": (1, 8)}  # pairs in a forward, forwards
SCRIPTS = {"pretrain_stage1": pretrain_stage1, "pretrain_stage2": pretrain_stage2, "finetune": finetune}
SAME = 1e-6
QFORMER = {**SMALL_QFORMER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    make_image_folder(root / "data", {"train": 8, "validation": 7})  # of 7 rows some are over in every layout
    for split, count in (("train", 8), ("validation", 7)):
        rows = [{"file_name": f"{n}.png", "text": TEXTS[n * n % 4 if n < 6 else 2]} for n in range(count)]
        (root / "data" / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    make_vision_model(root / "tower")
    make_language_model(root / "llama", "llama")
    make_language_model(root / "t5", "t5", dropout_rate=0.0)
    return root


def fields(parts: Path, out: Path, batch: int, forwards: int, **others: object) -> dict:
    """One step of one global batch of eight pairs, and a validation."""
    return {
        "dataset": parts / "data",
        "output_dir": out,
        "eval_split": "validation",
        "eval_samples": 0,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": forwards,
        "max_steps": 1,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "augment": False,
        "report_to": "none",
        **others,
    }


def new_model(parts: Path, **others: object) -> dict:
    return {
        "vision_model": parts / "tower",
        "num_query_tokens": 4,
        "qformer_config": json.dumps(QFORMER),
        **others,
    }


def figures(script: str, run_fields: dict) -> dict[str, float]:
    """Losses, gradient norm and validated losses of a run in this process."""
    SCRIPTS[script].main(flags(run_fields))
    return figures_in(run_fields["output_dir"])


def figures_in(out: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    merged = {name: value for line in lines for name, value in line.items()}
    return {name: value for name, value in merged.items() if "loss" in name or name == "grad_norm"}


@pytest.mark.parametrize("language_model", ["llama", "t5"])
def test_stage_2_and_its_fine_tuning(parts, tmp_path, language_model):
    own = new_model(parts, language_model=parts / language_model)
    expected = figures("pretrain_stage2", fields(parts, tmp_path / "whole", 8, 1, **own))
    assert expected.keys() == {"loss", "grad_norm", "eval_loss"} and expected["grad_norm"] > 0.1
    for name, (batch, forwards) in LAYOUTS.items():
        found = figures("pretrain_stage2", fields(parts, tmp_path / name, batch, forwards, **own))
        assert found == pytest.approx(expected, rel=SAME), name
    tuned = {"init_from": tmp_path / "whole", "task": "caption"}
    expected = figures("finetune", fields(parts, tmp_path / "tuned", 8, 1, **tuned))
    found = figures("finetune", fields(parts, tmp_path / "tuned 2 x 4", 2, 4, **tuned))
    assert found == pytest.approx(expected, rel=SAME)


def test_itg_of_stage_1_and_of_chunks(parts, tmp_path):
    own = new_model(parts, min_word_count=1, objectives="itg", rerank_k=0)
    expected = figures("pretrain_stage1", fields(parts, tmp_path / "whole", 8, 1, **own))
    assert expected.keys() == {"loss", "loss_itg", "grad_norm", "eval_loss", "eval_loss_itg"}
    for name, (batch, forwards) in LAYOUTS.items():
        found = figures("pretrain_stage1", fields(parts, tmp_path / name, batch, forwards, **own))
        assert found == pytest.approx(expected, rel=SAME), name
        chunked = fields(parts, tmp_path / f"{name} chunked", batch, forwards, itc_chunk_size=3, **own)
        assert figures("pretrain_stage1", chunked) == pytest.approx(expected, rel=SAME), name


def test_all_objectives_validate_itg_over_every_token(parts, tmp_path):
    """ITC and ITM contrast the pairs of a batch, and depend on its size; their total with ITG is that of the line."""
    own = new_model(parts, min_word_count=1, rerank_k=0)
    found = [
        figures("pretrain_stage1", fields(parts, tmp_path / str(size), 8, 1, per_device_eval_batch_size=size, **own))
        for size in (3, 7, 8)
    ]
    assert [one["eval_loss_itg"] for one in found] == pytest.approx([found[0]["eval_loss_itg"]] * 3, rel=SAME)
    assert found[0]["eval_loss_itc"] != pytest.approx(found[1]["eval_loss_itc"], rel=0.01)
    for one in found:
        total = one["eval_loss_itc"] + one["eval_loss_itm"] + one["eval_loss_itg"]
        assert one["eval_loss"] == pytest.approx(total, rel=SAME)


def test_two_processes(parts, tmp_path):
    """With one forward and with two, plain and in chunks."""
    stage2 = new_model(parts, language_model=parts / "llama")
    stage1 = new_model(parts, min_word_count=1, objectives="itg", rerank_k=0)
    runs = {"pretrain_stage2": {"stage 2": stage2}, "pretrain_stage1": {"stage 1": stage1}}
    runs["pretrain_stage1"]["chunks"] = {**stage1, "itc_chunk_size": 1}
    scripts = []
    for script, kinds in runs.items():
        for kind, own in kinds.items():
            for batch, forwards in ((4, 1), (2, 2)):
                out = tmp_path / f"{kind} {batch} x {forwards}"
                scripts.append([script, flags(fields(parts, out, batch, forwards, **own))])
    run(2, scripts)
    for script, kinds in runs.items():
        expected = figures(script, fields(parts, tmp_path / f"{script} whole", 8, 1, **next(iter(kinds.values()))))
        for kind in kinds:
            for layout in ("4 x 1", "2 x 2"):
                assert figures_in(tmp_path / f"{kind} {layout}") == pytest.approx(expected, rel=SAME), (kind, layout)
