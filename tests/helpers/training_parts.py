"""What the tests of the training scripts start from: a folder of images with captions, and tiny models on disk."""

import copy
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.helpers.tiny import LANGUAGE_MODELS, TOWERS, image_processor, liven, llm_tokenizer

SMALL_QFORMER = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def make_image_folder(folder: Path, splits: dict[str, int]) -> Path:
    """imagefolder with a metadata.jsonl a split: coloured squares, two captions each."""
    generator = np.random.default_rng(0)
    for split, count in splits.items():
        (folder / split).mkdir(parents=True)
        rows = []
        for number in range(count):
            colour, left = list(COLOURS)[number % len(COLOURS)], int(generator.integers(0, 30))
            pixels = np.zeros((40, 48, 3), np.uint8)
            pixels[10:30, left : left + 16] = COLOURS[colour]
            Image.fromarray(pixels).save(folder / split / f"{number}.png")
            side = "left" if left < 15 else "right"
            captions = [f"A {colour} square.", f"a {colour} square on the {side}"]
            rows.append(json.dumps({"file_name": f"{number}.png", "captions": captions}))
        (folder / split / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def put_pictures(folder: Path, names: list[str]) -> Path:
    """Pictures of 40 x 30 pixels, each of a colour of its own."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (60 * number, 0, 200)).save(folder / name)
    return folder


def make_vision_model(folder: Path, tower: str = "clip") -> Path:
    torch.manual_seed(0)
    model = AutoModel.from_config(TOWERS[tower])
    liven(model)
    model.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def make_language_model(folder: Path, name: str, **changes: int) -> Path:
    """changes: fields of the tiny config."""
    torch.manual_seed(0)
    config = copy.deepcopy(LANGUAGE_MODELS[name])
    for field, value in changes.items():
        setattr(config, field, value)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = config.pad_token_id
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    kind.from_config(config).save_pretrained(folder)
    llm_tokenizer(bos=not config.is_encoder_decoder).save_pretrained(folder)
    return folder


def run_stage1(dataset: Path, tower: Path, out: Path, *flags: str) -> list[dict]:
    """Stage 1 with a tiny Q-Former over such a folder, by the script; returns the lines of metrics.jsonl."""
    from blip2x_training import pretrain_stage1

    pretrain_stage1.main([*stage1_flags(dataset, tower, out), *flags])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def stage1_flags(dataset: Path, tower: Path, out: Path) -> list[str]:
    fields = {
        "dataset": dataset,
        "vision_model": tower,
        "output_dir": out,
        "text_column": "captions",
        "qformer_config": json.dumps(SMALL_QFORMER),
        "num_query_tokens": 4,
        "image_text_hidden_size": 16,
        "min_word_count": 1,
        "per_device_train_batch_size": 4,
        "warmup_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
    }
    return [f"--{name}={value}" for name, value in fields.items()]


def disable_adapters(model: torch.nn.Module) -> None:
    """By peft's layers: transformers' method of this name wants, from 5.24 on, a peft that is not out."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)


def make_tars(folder: Path, counts: list[int], extra=()) -> list[str]:
    """Shards with 000.jpg, 000.txt or 000.json, and so on; names repeat from shard to shard."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for number in range(count):
                buffer, text = io.BytesIO(), f"text {shard} {number}"
                Image.fromarray(generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(buffer, "JPEG")
                about = json.dumps({"caption": text, "url": "x", "width": 24}) if shard % 2 else text
                files = {"jpg": buffer.getvalue(), "json" if shard % 2 else "txt": about.encode()}
                for ending, content in (files | dict(extra)).items():
                    member = tarfile.TarInfo(f"{number:03d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return [str(path) for path in sorted(folder.glob("*.tar"))]
