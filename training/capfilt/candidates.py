"""CapFilt's two halves: captions drawn by one model (BLIP, section 3.3), ranked with the web's by another (BLIP-2, 3.4).

Every image draws its captions with numbers of its own, made from (seed, row). So they depend neither on the images drawn
before nor on those beside it, except where a batch of another size rounds a logit differently and a number falls between.
"""

import random
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
)

from modeling_blip2x import Blip2xForPreTraining, Blip2xProcessor
from modeling_blip2x.plain_words_blip2x import PlainWords

from ..data.transforms import clean_caption
from ..models.loading import is_stage1

RANKINGS = ("itc", "itm", "itc+itm")


@dataclass
class Candidate:
    """A caption of an image; `source` is web or synthetic."""

    text: str
    source: str
    score: float = 0.0


class SeededNucleus(LogitsProcessor):
    """Nucleus sampling with given numbers: leaves one token of each row, for `generate` to draw.

    Args:
        numbers: (rows, steps) in [0, 1), one for each token to draw.
        top_p: only the likeliest tokens are drawn from, as few as reach this probability.
    """

    def __init__(self, numbers: torch.Tensor, top_p: float, temperature: float):
        self.numbers, self.top_p, self.temperature, self.step = numbers, top_p, temperature, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        probabilities = (scores.double() / self.temperature).softmax(-1)
        ordered, tokens = probabilities.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= self.top_p
        nucleus = torch.zeros_like(probabilities).scatter(-1, tokens, ordered.masked_fill(outside, 0))
        upto = nucleus.cumsum(-1)
        number = self.numbers[:, self.step, None].to(upto) * upto[:, -1:]
        drawn = torch.searchsorted(upto, number, right=True)  # the first token whose cumulative sum exceeds the number
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


def numbers_of(seed: int, row: int, captions: int, steps: int) -> torch.Tensor:
    """(captions, steps) in [0, 1) for the captions of a row."""
    draw = random.Random(f"{seed}-{row}")
    return torch.tensor([[draw.random() for _ in range(steps)] for _ in range(captions)], dtype=torch.float64)


def encode_images(model, processor: Blip2xProcessor, images: list) -> torch.Tensor:
    """Features (B, N, D) of the tower."""
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    return model.shared_model.get_vision_embeds(pixels.to(model.device))


def sample_captions(
    model,
    processor: Blip2xProcessor,
    images: list,
    vision_embeds: torch.Tensor,
    numbers: torch.Tensor,
    *,
    prompt: str,
    top_p: float,
    temperature: float,
    min_new_tokens: int,
) -> list[list[str]]:
    """Captions of B images, C of each, drawn with `numbers` (B, C, tokens). A stage-1 model captions by its ITG head."""
    batch, captions, tokens = numbers.shape
    nucleus = SeededNucleus(numbers.flatten(0, 1).to(model.device), top_p, temperature)
    options = {
        "vision_embeds": vision_embeds,
        "max_new_tokens": tokens,
        "min_new_tokens": min_new_tokens,
        "num_return_sequences": captions,
        "logits_processor": LogitsProcessorList([nucleus]),
        # Whatever the checkpoint's own generation config says: the nucleus above is all that draws.
        **{"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
    }
    if is_stage1(model):
        ids = model.generate(**options)
        texts = processor.batch_decode_new(ids)
    else:
        texts = {"text": [prompt] * batch, "split_special_tokens": True, "padding": True}
        inputs = processor(images=images, **texts, return_tensors="pt").to(model.device)
        del inputs["pixel_values"]  # the tower has seen them
        ids = model.generate(**inputs, **options)
        texts = processor.batch_decode_new(ids, inputs["input_ids"])
    return [[text.strip() for text in texts[start : start + captions]] for start in range(0, len(texts), captions)]


def candidates_of(web: list[str], synthetic: list[str]) -> list[Candidate]:
    """The different captions of an image: what `clean_caption` makes equal counts once, as the web's where it is one."""
    found: dict[str, Candidate] = {}
    for source, texts in (("web", web), ("synthetic", synthetic)):
        for text in texts:
            key = clean_caption(text)
            if key:
                found.setdefault(key, Candidate(text, source))
    return list(found.values())


@torch.no_grad()
def score(
    model: Blip2xForPreTraining,
    processor: Blip2xProcessor,
    vision_embeds: torch.Tensor,
    candidates: list[list[Candidate]],
    rank_by: str,
    max_text_length: int,
) -> None:
    """Set the score of the candidates of B images: ITC cosine, ITM match logit, or their sum.

    The scorer reads what training reads, that is cleaned captions.
    """
    texts = [clean_caption(candidate.text) for row in candidates for candidate in row]
    owner = [number for number, row in enumerate(candidates) for _ in row]
    if not texts:
        return
    owner = torch.tensor(owner, device=model.device)
    encoded = (
        PlainWords(processor.tokenizer)
        .batch(texts, padding=True, truncation=True, max_length=max_text_length, return_tensors="pt")
        .to(model.device)
    )
    text = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    scores = torch.zeros(len(texts), device=model.device)
    if "itc" in rank_by:
        features = model.get_image_features(vision_embeds=vision_embeds).pooler_output
        cosines = model.itc_scores(features, model.get_text_features(**text).pooler_output)  # (B, texts)
        scores += cosines[owner, torch.arange(len(owner), device=owner.device)]
    if "itm" in rank_by:
        scores += model.itm_logits(vision_embeds=vision_embeds, image_index=owner, **text)[:, 1]
    for candidate, value in zip((c for row in candidates for c in row), scores.tolist()):
        candidate.score = value


def best(candidates: list[Candidate], keep: int) -> list[Candidate]:
    """The `keep` of highest score, best first; of equals the earlier, so the web's before a synthetic one."""
    return sorted(candidates, key=lambda candidate: -candidate.score)[:keep]
