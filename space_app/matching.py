"""Scores of images and texts: ITC cosines and ITM match probabilities, and rankings by them."""

import threading
from collections.abc import Callable

import torch
from mistakes import Mistake
from models import NO_SCORES, Models, Part
from PIL import Image
from work import Stopped

BATCH = 16  # images that the tower sees at once
RERANKED = 16  # candidates of ITC whose order ITM may change
Progress = Callable[[tuple[int, int], str], object]


def matcher_of(models: Models) -> Part:
    """The part that scores. Raises Mistake where there is none."""
    if models.matcher is None:
        raise Mistake(NO_SCORES)
    return models.matcher


@torch.no_grad()
def encode(
    part: Part, images: list[Image.Image], texts: list[str], stop: threading.Event, progress: Progress
) -> tuple[torch.Tensor, dict, torch.Tensor]:
    """Tower features (N, P, D), tokens of the texts, and ITC cosines (N, M)."""
    seen, features = [], []
    for start in range(0, len(images), BATCH):
        if stop.is_set():
            raise Stopped
        progress((start, len(images)), "Looking at the pictures")
        seen.append(part.see(images[start : start + BATCH]))
        features.append(part.model.get_image_features(vision_embeds=seen[-1]).pooler_output)
    longest = part.model.config.qformer_config.max_position_embeddings
    tokens = part.processor(text=texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    tokens = tokens.to(part.model.device)
    text_features = part.model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
    return torch.cat(seen), tokens, part.model.itc_scores(torch.cat(features), text_features).float()


@torch.no_grad()
def match(
    models: Models, images: list[Image.Image], texts: list[str], stop: threading.Event, progress: Progress
) -> dict[str, list]:
    """{"texts": [M], "itc": N x M cosines, "itm": N x M match probabilities}."""
    part = matcher_of(models)
    seen, tokens, cosines = encode(part, images, texts, stop, progress)
    rows = []
    for row in range(len(images)):
        if stop.is_set():
            raise Stopped
        progress((row, len(images)), "Matching")
        rows.append(part.model.itm_scores(vision_embeds=seen[row : row + 1], grid=True, **tokens)[0].float())
    return {"texts": texts, "itc": rounded(cosines), "itm": rounded(torch.stack(rows))}


@torch.no_grad()
def rank_images(
    models: Models, images: list[Image.Image], query: str, rerank: int, stop: threading.Event, progress: Progress
) -> list[dict]:
    """Images for a text, best first: [{"image": number from 0, "itc": cosine, "itm": match probability or None}]."""
    part = matcher_of(models)
    seen, tokens, cosines = encode(part, images, [query], stop, progress)
    order = cosines[:, 0].argsort(descending=True, stable=True)
    first = order[:rerank]
    ids, mask = (tokens[name].expand(len(first), -1) for name in ("input_ids", "attention_mask"))
    return _ranking("image", cosines[:, 0], order, first, _itm_logits(part, seen[first], ids, mask, stop, progress))


@torch.no_grad()
def rank_texts(
    models: Models, image: Image.Image, texts: list[str], rerank: int, stop: threading.Event, progress: Progress
) -> list[dict]:
    """Texts for an image, best first: [{"text": ..., "itc": cosine, "itm": match probability or None}]."""
    part = matcher_of(models)
    seen, tokens, cosines = encode(part, [image], texts, stop, progress)
    order = cosines[0].argsort(descending=True, stable=True)
    first = order[:rerank]
    ids, mask = tokens["input_ids"][first], tokens["attention_mask"][first]
    features = seen.expand(len(first), -1, -1)
    ranking = _ranking("text", cosines[0], order, first, _itm_logits(part, features, ids, mask, stop, progress))
    return [row | {"text": texts[row["text"]]} for row in ranking]


def _itm_logits(part: Part, seen, ids, mask, stop: threading.Event, progress: Progress) -> torch.Tensor:
    """(pairs, 2) of image i with text i."""
    logits = [torch.zeros(0, 2, device=part.model.device)]
    for start in range(0, len(ids), BATCH):
        if stop.is_set():
            raise Stopped
        progress((start, len(ids)), "Matching")
        rows = slice(start, start + BATCH)
        logits.append(part.model.itm_logits(input_ids=ids[rows], attention_mask=mask[rows], vision_embeds=seen[rows]))
    return torch.cat(logits).float()


def _ranking(name: str, cosines: torch.Tensor, order, first, itm_logits: torch.Tensor) -> list[dict]:
    """The candidates in the order of match logit + cosine (as in LAVIS), then the rest in the order of the cosine."""
    best = (itm_logits[:, 1] + cosines[first]).argsort(descending=True, stable=True)
    matches = dict(zip(first.tolist(), rounded(itm_logits.softmax(-1)[:, 1])))
    indices = [*first[best].tolist(), *order[len(first) :].tolist()]
    return [{name: i, "itc": round(float(cosines[i]), 4), "itm": matches.get(i)} for i in indices]


def rounded(scores: torch.Tensor) -> list:
    """Nested lists with four digits."""
    return torch.round(scores.double(), decimals=4).tolist()
