"""What feature_cache.py times: stage-1 steps of training with and without a cache, and the writing of one."""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, CLIPImageProcessor

from blip2x_training import cache_features
from blip2x_training.data.caption_dataset import CaptionDataset, make_loader
from blip2x_training.data.collators import Stage1Collator
from blip2x_training.data.feature_cache import tower_fingerprint, use_feature_cache
from blip2x_training.data.formats import load_rows
from blip2x_training.data.order import BatchOrder, EpochOrder
from blip2x_training.data.vocabulary import build_tokenizer
from blip2x_training.engine.optimizer import build_optimizer
from modeling_blip2x import Blip2xForPreTraining, Blip2xProcessor, Blip2xQFormerConfig

WORDS = "a man woman dog child two red blue in on the water grass runs jumps stands with ball street snow".split()


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
    start = time.perf_counter()
    for shard in split.missing:
        cache_features.write_shard(
            split, shard, views, tower, layer, cache, {"batch_size": batch_size, "num_workers": 0}
        )
    seconds = time.perf_counter() - start
    os.replace(cache / "train.json.begun", cache / "train.json")
    written = sum(path.stat().st_size for path in cache.glob("*.npy"))
    return {"images": len(split.images), "seconds": seconds, "bytes": written}


def measure(
    tower_config,
    feature_layer: int,
    qformer: dict,
    num_query_tokens: int,
    batch_size: int,
    *,
    device: str,
    steps: int,
    warmup: int,
    bf16: bool,
) -> dict:
    """Medians in seconds of data and step with and without a cache, and the cost of writing it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dataset = write_images(folder / "data", 2 * batch_size)
        image_processor = CLIPImageProcessor()
        torch.manual_seed(0)
        tower = AutoModel.from_config(tower_config).eval()
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
            Blip2xQFormerConfig(**ids, **qformer),
            tokenizer=processor.tokenizer,
            num_query_tokens=num_query_tokens,
            vision_feature_layer=feature_layer,
        ).to(device)
        model.freeze_unimodal()
        model.shared_model.vision_model.to(memory_format=torch.channels_last)  # as cache_features.py does
        writing = write_cache(folder / "tower", dataset, folder / "cache", model, image_processor, batch_size)
        use_feature_cache(str(folder / "cache"), model, image_processor, {"train": cached})
        collator = Stage1Collator(image_processor, processor.tokenizer, 32, cropped=False)
        order = BatchOrder(EpochOrder(len(plain), seed=0), batch_size, warmup + steps)
        loaders = {
            "without": iter(make_loader(plain, order, collator, 0, False)),
            "with": iter(make_loader(cached, order, collator, 0, False)),
        }
        optimizer = build_optimizer(model, learning_rate=1e-4, weight_decay=0.05, betas=(0.9, 0.98))
        model.eval()  # no dropout: the two may be compared
        losses = {}
        for kind, dataset_of_kind in (("without", plain), ("with", cached)):
            batch = collator([dataset_of_kind[0, row] for row in range(batch_size)])
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
                losses[kind] = model(**{k: v.to(device) for k, v in batch.items()}, negative_seed=0).loss.item()
        model.train()
        seconds = {kind: {"data": [], "step": []} for kind in loaders}
        for number in range(warmup + steps):
            for kind, batches in loaders.items():
                start = time.perf_counter()
                batch = {key: value.to(device) for key, value in next(batches).items()}
                loaded = time.perf_counter()
                with torch.autocast(device, torch.bfloat16, enabled=bf16):
                    loss = model(**batch, negative_seed=number).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                loss.item()  # kernels of a GPU run asynchronously: wait for them
                if number >= warmup:
                    seconds[kind]["data"].append(loaded - start)
                    seconds[kind]["step"].append(time.perf_counter() - start)
    medians = {k: {part: statistics.median(values) for part, values in v.items()} for k, v in seconds.items()}
    return {"losses": losses, "writing": writing, **medians}
