"""Two gloo processes on a CPU train as one process does with the same global batch."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers.ranks import run
from tests.helpers.training_parts import SMALL_QFORMER, make_image_folder, make_language_model, make_vision_model

QFORMER = {**SMALL_QFORMER, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("distributed")
    make_image_folder(root / "data", {"train": 10, "validation": 5})  # batches of 4 divide neither
    make_vision_model(root / "tower")
    make_language_model(root / "llm", "llama")
    return root


def test_two_processes_train_as_one(parts, tmp_path):
    common = [
        "--dataset",
        parts / "data",
        "--vision_model",
        parts / "tower",
        "--text_column",
        "captions",
        "--eval_split",
        "validation",
        "--max_steps",
        "4",
        "--logging_steps",
        "1",
        "--warmup_steps",
        "1",
        "--learning_rate",
        "1e-3",
        "--num_query_tokens",
        "4",
        "--qformer_config",
        json.dumps(QFORMER),
    ]
    stage1 = [*common, "--min_word_count", "1", "--rerank_k", "2", "--eval_steps", "2"]
    stage2 = [*common, "--language_model", parts / "llm"]
    chunked = [
        *stage1,
        "--per_device_train_batch_size",
        2,
        "--itc_chunk_size",
        1,
        "--output_dir",
        tmp_path / "2/chunked",
    ]
    for processes in (1, 2):
        out, batch = tmp_path / str(processes), ["--per_device_train_batch_size", 4 // processes]
        run(
            processes,
            [
                ("pretrain_stage1", [*map(str, [*stage1, *batch, "--output_dir", out / "stage1"])]),
                ("pretrain_stage2", [*map(str, [*stage2, *batch, "--output_dir", out / "stage2"])]),
                *([("pretrain_stage1", [*map(str, chunked)])] if processes == 2 else []),
            ],
        )
    for stage, other, lines in (("stage1", "stage1", 6), ("stage1", "chunked", 6), ("stage2", "stage2", 5)):
        one, two = tmp_path / "1" / stage, tmp_path / "2" / other
        losses = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (one, two)]
        assert len(losses[0]) == len(losses[1]) == lines
        for first, second in zip(*losses):
            names = [name for name in first if "loss" in name or name == "grad_norm"]
            assert [first[n] for n in names] == pytest.approx([second[n] for n in names], rel=1e-3, abs=1e-4)
        first, second = (load_file(out / "model.safetensors") for out in (one, two))
        for name, tensor in first.items():
            assert (tensor - second[name]).abs().max() < 1e-3, name
