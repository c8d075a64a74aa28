"""Runs of both stages by their scripts, in this process."""

import json
from pathlib import Path

from blip2x_training import pretrain_stage1, pretrain_stage2
from tests.helpers.training_parts import SMALL_QFORMER

QFORMER = json.dumps(SMALL_QFORMER)
COMMON = [
    "--text_column",
    "captions",
    "--per_device_train_batch_size",
    "4",
    "--warmup_steps",
    "2",
    "--logging_steps",
    "1",
    "--learning_rate",
    "1e-3",
    "--save_steps",
    "5",
]


def stage1(parts: Path, out: Path, *flags: str) -> list[dict]:
    """Run stage 1; returns the lines of metrics.jsonl."""
    pretrain_stage1.main(
        [
            *COMMON,
            "--dataset",
            str(parts / "data"),
            "--vision_model",
            str(parts / "tower"),
            "--output_dir",
            str(out),
            "--qformer_config",
            QFORMER,
            "--num_query_tokens",
            "4",
            "--image_text_hidden_size",
            "16",
            "--min_word_count",
            "1",
            "--rerank_k",
            "3",
            *flags,
        ]
    )
    return metrics(out)


def stage2(parts: Path, out: Path, llm: str, *flags: str) -> list[dict]:
    """Run stage 2 with the language model parts/llm; returns the lines of metrics.jsonl."""
    pretrain_stage2.main(
        [
            *COMMON,
            "--dataset",
            str(parts / "data"),
            "--init_from",
            str(parts / "stage1"),
            "--language_model",
            str(parts / llm),
            "--output_dir",
            str(out),
            *flags,
        ]
    )
    return metrics(out)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_speed(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in ("samples_per_second", "peak_memory_mb")} for line in lines]


def interrupted_after(step: int, monkeypatch):
    """Let the next run die right after the checkpoint of `step`."""
    from blip2x_training.engine import train_loop

    save = train_loop.save_step

    def save_and_die(output_dir, state, *rest):
        save(output_dir, state, *rest)
        if state["step"] == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_loop, "save_step", save_and_die)
