"""A stage-1 step with and without the feature cache, and what writing the cache costs.

    python benchmarks/feature_cache.py [--case mobilenet_v2 vit_l] [--bf16] [--output FILE.json]

Random weights of real sizes, JPEG files of Flickr8k's size made of noise, no network. Both kinds of step are those of
training: rows through the data loader (without a cache: reading, decoding, resizing, tower; with it: reading features),
collator, three losses, backward, clipping, AdamW. Same weights, same rows in the same order; steps alternate, so that a
busy machine is busy for both; CPU time is what this process took of all its threads. Medians after warm-up. Losses of the first step are compared first.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, CLIPImageProcessor, CLIPVisionConfig, MobileNetV2Config

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "training")]

import cache_features  # noqa: E402
from collators import Stage1Collator  # noqa: E402
from data import CaptionDataset, make_loader  # noqa: E402
from features import tower_fingerprint, use_feature_cache  # noqa: E402
from optim import build_optimizer  # noqa: E402
from order import BatchOrder, EpochOrder  # noqa: E402
from sources import load_rows  # noqa: E402
from vocabulary import build_tokenizer  # noqa: E402

from modeling_blip2x import Blip2xForPreTraining, Blip2xProcessor, Blip2xQFormerConfig  # noqa: E402

WORDS = "a man woman dog child two red blue in on the water grass runs jumps stands with ball street snow".split()


@dataclass
class Case:
    """A tower, the Q-Former that reads it, and the pairs of a step."""

    tower: object
    feature_layer: int
    qformer: dict
    num_query_tokens: int
    batch_size: int


CASES = {
    # 49 positions x 1280; the Q-Former of the Flickr8k recipe
    "mobilenet_v2": Case(
        MobileNetV2Config(),
        -1,
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
        8,
        32,
    ),
    # 257 positions x 1024; the paper's Q-Former
    "vit_l": Case(
        CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=224,
            patch_size=14,
        ),
        -2,
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
        32,
        8,
    ),
}


def write_images(folder: Path, count: int) -> Path:
    """imagefolder of `count` JPEGs of 500 x 375 pixels, each with a caption of eleven words."""
    generator = np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    lines = []
    for number in range(count):
        noise = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        noise.resize((500, 375), Image.Resampling.BICUBIC).save(folder / "train" / f"{number:04d}.jpg")
        text = " ".join(generator.choice(WORDS, 11))
        lines.append(json.dumps({"file_name": f"{number:04d}.jpg", "text": text}))
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def write_cache(tower_folder: Path, dataset: Path, cache: Path, model, image_processor, batch_size: int) -> dict:
    """Seconds and bytes of encoding the data set, without loading the tower."""
    tower, layer = model.shared_model.vision_model, model.config.vision_feature_layer
    args = cache_features.CacheArguments(str(dataset), str(cache), str(tower_folder), ["train"], batch_size=batch_size)
    shape = cache_features.feature_shape(tower, image_processor, layer)
    split = cache_features.plan_split(args, "train", 1, shape, tower_fingerprint(tower, layer, image_processor))
    cache_features.check_disk([split], cache)
    cache.mkdir()
    cache_features.begin(split, cache)
    views = cache_features.Views(split.images, image_processor, 1, 0)
    start, busy = time.perf_counter(), time.process_time()
    for shard in split.missing:
        cache_features.write_shard(
            split, shard, views, tower, layer, cache, {"batch_size": batch_size, "num_workers": 0}
        )
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    os.replace(cache / "train.json.begun", cache / "train.json")
    written = sum(path.stat().st_size for path in cache.glob("*.npy"))
    return {"images": len(split.images), "seconds": seconds, "busy": busy, "bytes": written}


def measure(name: str, case: Case, steps: int, warmup: int, bf16: bool) -> dict:
    """Medians in seconds of data, step and CPU time with and without a cache, and the cost of writing it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dataset = write_images(folder / "data", 2 * case.batch_size)
        image_processor = CLIPImageProcessor()
        torch.manual_seed(0)
        tower = AutoModel.from_config(case.tower).eval()
        rows = load_rows(str(dataset), "train")
        plain, cached = (CaptionDataset(rows, image_column="image", text_column="text") for _ in range(2))
        tokenizer = build_tokenizer([text for texts in plain.texts for text in texts], 1)
        processor = Blip2xProcessor(image_processor, tokenizer)
        ids = {
            "vocab_size": max(30523, len(processor.tokenizer)),
            "bos_token_id": processor.tokenizer.bos_token_id,
            "eos_token_id": processor.tokenizer.sep_token_id,
            "pad_token_id": processor.tokenizer.pad_token_id,
        }
        model = Blip2xForPreTraining.from_unimodal(
            tower,
            Blip2xQFormerConfig(**ids, **case.qformer),
            tokenizer=processor.tokenizer,
            num_query_tokens=case.num_query_tokens,
            vision_feature_layer=case.feature_layer,
        ).to(device)
        model.freeze_unimodal()
        model.shared_model.vision_model.to(memory_format=torch.channels_last)  # as cache_features.py does
        writing = write_cache(folder / "tower", dataset, folder / "cache", model, image_processor, case.batch_size)
        use_feature_cache(str(folder / "cache"), model, image_processor, {"train": cached})
        collator = Stage1Collator(image_processor, processor.tokenizer, 32, cropped=False)
        order = BatchOrder(EpochOrder(len(plain), seed=0), case.batch_size, warmup + steps)
        loaders = {
            "without": iter(make_loader(plain, order, collator, 0, False)),
            "with": iter(make_loader(cached, order, collator, 0, False)),
        }
        optimizer = build_optimizer(model, learning_rate=1e-4, weight_decay=0.05, betas=(0.9, 0.98))
        model.eval()  # no dropout: the two may be compared
        losses = {}
        for kind, dataset_of_kind in (("without", plain), ("with", cached)):
            batch = collator([dataset_of_kind[0, row] for row in range(case.batch_size)])
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
                losses[kind] = model(**{k: v.to(device) for k, v in batch.items()}, negative_seed=0).loss.item()
        model.train()
        seconds = {kind: {"data": [], "step": [], "busy": []} for kind in loaders}
        for number in range(warmup + steps):
            for kind, batches in loaders.items():
                start, busy = time.perf_counter(), time.process_time()
                batch = {key: value.to(device) for key, value in next(batches).items()}
                loaded = time.perf_counter()
                with torch.autocast(device, torch.bfloat16, enabled=bf16):
                    loss = model(**batch, negative_seed=number).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                loss.item()  # a GPU has finished
                if number >= warmup:
                    seconds[kind]["data"].append(loaded - start)
                    seconds[kind]["step"].append(time.perf_counter() - start)
                    seconds[kind]["busy"].append(time.process_time() - busy)
    medians = {k: {part: statistics.median(values) for part, values in v.items()} for k, v in seconds.items()}
    return {"case": name, "device": device, "losses": losses, "writing": writing, **medians}


def show(result: dict, case: Case, steps: int, dtype: str) -> None:
    plain, cached, writing = result["without"], result["with"], result["writing"]
    per_image = writing["seconds"] / writing["images"]
    # A CPU's time does not count what else the machine does; a GPU's work is none of it.
    writing_time, step_time = ("busy", "busy") if result["device"] == "cpu" else ("seconds", "step")
    saved = (plain[step_time] - cached[step_time]) / case.batch_size
    pays_after = writing[writing_time] / writing["images"] / saved
    print(
        f"\n{result['case']}, {result['device']}, {dtype}, batch {case.batch_size}, medians of {steps} alternating steps\n"
        f"  step without cache   {plain['step']:8.3f} s, of which reading and preprocessing images {plain['data']:.3f} s\n"
        f"  step with cache      {cached['step']:8.3f} s, of which reading features {cached['data']:.3f} s\n"
        f"  ratio                {plain['step'] / cached['step']:8.2f}\n"
        f"  CPU time             {plain['busy']:8.3f} s without, {cached['busy']:.3f} s with, ratio "
        f"{plain['busy'] / cached['busy']:.2f}\n"
        f"  loss, same batch     {result['losses']['without']:.6f} without, {result['losses']['with']:.6f} with\n"
        f"  writing              {per_image:8.3f} s and {writing['bytes'] / writing['images'] / 1e3:.1f} kB an image "
        f"(float16; {writing['images']} images in {writing['seconds']:.1f} s, "
        f"{writing['busy']:.1f} s of CPU time)\n"
        f"  pays after           {pays_after:8.2f} epochs"
    )


def run(cases: list[str], steps: int = 5, warmup: int = 2, bf16: bool = False) -> list[dict]:
    """Prints each case; returns one object a case, step times in seconds."""
    dtype, rows = "bfloat16 autocast" if bf16 else "float32", []
    for name in cases:
        result = measure(name, CASES[name], steps, warmup, bf16)
        show(result, CASES[name], steps, dtype)
        ours, baseline = result["with"]["step"], result["without"]["step"]
        rows.append({"suite": "feature_cache", "case": name, "device": result["device"], "dtype": dtype})
        rows[-1] |= {"ours": ours, "baseline": baseline, "unit": "s/step", "ratio": baseline / ours}
        rows[-1] |= {"aim": None, "met": None}  # no aim was set for it
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each kind before them")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, as --bf16 in training")
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args()
    rows = run(args.case, args.steps, args.warmup, args.bf16)
    if args.output:
        Path(args.output).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
