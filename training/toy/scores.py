"""Figures of the embedded default: caption exact match, VQA accuracy with a blind row, and retrieval."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xForPreTraining, Blip2xProcessor
from modeling_blip2x.images_blip2x import rgb_image

from ..data.caption_dataset import CaptionDataset, Sampling
from ..data.collators import Stage1Collator
from ..data.formats import load_rows
from ..evaluation.retrieval import RetrievalSet, rerank
from ..metrics.retrieval_recall.scores import recall_at_k
from .scenes import IMAGE_SIZE, QUESTION_TYPES

DISTINCT_SCENES = 200  # how many a retrieval chooses among
SHORTLIST = 16  # best by ITC that ITM ranks again
BATCH_SIZE = 250


@torch.no_grad()
def generate(model, processor, images: list[Image.Image], prompts: list[str], max_new_tokens: int) -> list[str]:
    """Greedy texts, one for each image and its prompt."""
    texts = []
    for start in range(0, len(prompts), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        batch = processor(images=images[part], text=prompts[part], padding=True, return_tensors="pt")
        ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        texts += processor.batch_decode_new(ids, batch["input_ids"])
    return texts


def noise_images(count: int, seed: int) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [
        Image.fromarray(pixels) for pixels in rng.integers(0, 256, (count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    ]


def score_generation(model_dir: str | Path, dataset: str | Path, split: str, seed: int) -> dict[str, float]:
    """caption: exact match. vqa, vqa_<type>: accuracy. blind, blind_<type>: the same with noise for every image."""
    model = Blip2xForConditionalGeneration.from_pretrained(model_dir).eval()
    processor = Blip2xProcessor.from_pretrained(model_dir)
    rows = load_rows(str(dataset), split)
    images = [rgb_image(row["image"]) for row in rows]
    captions = generate(model, processor, images, [row["prompt"][0] for row in rows.remove_columns("image")], 14)
    scores = {
        "caption": float(np.mean([text == row["caption"] for text, row in zip(captions, rows.remove_columns("image"))]))
    }

    asked = []  # (image, type, prompt, answer)
    for index, row in enumerate(rows.remove_columns("image")):
        asked += [(index, *qa) for qa in zip(row["type"], row["prompt"], row["text"]) if qa[0] != "caption"]
    asked.sort(key=lambda qa: qa[1])  # questions of a type are of similar length: less padding
    noise = noise_images(len(rows), seed)
    for name, shown in (("vqa", images), ("blind", noise)):
        answers = generate(model, processor, [shown[qa[0]] for qa in asked], [qa[2] for qa in asked], 2)
        right = np.array([answer == qa[3] for answer, qa in zip(answers, asked)])
        scores[name] = float(right.mean())
        for kind in QUESTION_TYPES:
            of_kind = np.array([qa[1] == kind for qa in asked])
            if of_kind.any():
                scores[f"{name}_{kind}"] = float(right[of_kind].mean())
    return scores


def distinct_rows(captions: list[str], count: int) -> list[int]:
    """The first rows whose captions differ from all before."""
    return sorted({caption: index for index, caption in reversed(list(enumerate(captions)))}.values())[:count]


def score_retrieval(model_dir: str | Path, dataset: str | Path, split: str) -> dict[str, float]:
    """R@1 among `DISTINCT_SCENES` scenes, the mean of both directions; each direction besides."""
    model = Blip2xForPreTraining.from_pretrained(model_dir).eval()
    processor = Blip2xProcessor.from_pretrained(model_dir)
    rows = load_rows(str(dataset), split)
    rows = rows.select(distinct_rows(rows["caption"][:], DISTINCT_SCENES))
    data = CaptionDataset(
        rows, image_column="image", text_column="caption", clean_captions=False, sampling=Sampling(draw_text=False)
    )
    collator = Stage1Collator(processor.image_processor, processor.tokenizer, max_text_length=32, cropped=False)
    encoded = RetrievalSet(model, data, collator, Accelerator(cpu=True))
    recalls = recall_at_k(encoded.cosines, encoded.owner) | rerank(encoded, SHORTLIST, model.temperature.item())
    scores = {"scenes": len(rows)}
    for name, ending in (("itc", ""), ("itm", "_itm"), ("itm+itc", "_itm+itc"), ("itm+logits", "_itm+logits")):
        ways = {way: recalls[f"{way}_r1{ending}"] / 100 for way in ("i2t", "t2i")}
        scores |= {name: sum(ways.values()) / 2, **{f"{name}_{way}": value for way, value in ways.items()}}
    return scores
