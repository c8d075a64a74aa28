"""Where the queries look: their cross-attention over the image, and for a caption, word by word.

A word has no attention to the image itself: it attends to the queries, and they to the image. Its map is the maps of the
queries, weighted by how much the word, when it was written, attended to each.
"""

import threading
from itertools import groupby

import numpy as np
import torch
from answers import prompt_inputs, room_left, room_of
from mistakes import Mistake
from models import Part
from PIL import Image
from settings import Settings, shown
from work import StopWhenTold

AVERAGE = "average"


def shape_of(part: Part) -> tuple[list[int], int, int]:
    """Numbers of the layers that look at the image, and how many heads and queries there are."""
    config = part.model.config
    return part.model.cross_attention_layers, config.qformer_config.num_attention_heads, config.num_query_tokens


def choice(value: str | int | None, allowed: list[int], what: str) -> int | None:
    """None for "average", else the number. Raises Mistake for what the model does not have."""
    if value in (None, "", AVERAGE):
        return None
    if str(value) not in map(str, allowed):  # "3" or 3; neither 3.5 nor True
        raise Mistake(f"{what} is {shown(value)}; choose average or one of {', '.join(map(str, allowed))}.")
    return int(value)


def query_maps(
    part: Part, image: Image.Image, layer: int | None, head: int | None, read: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """(Q, rows, columns): where every query looks, each map summing to 1. None averages over layers or heads.

    read: the text that instruction-aware queries read, as the processor gives it.

    Raises:
        Mistake: the tower's positions are no grid over the picture.
    """
    size = part.pixels([image]).shape[-2:]
    try:
        maps = part.model.query_attention(
            vision_embeds=part.see([image]), layer=layer, head=head, image_size=size, **(read or {})
        )
    except ValueError as error:
        raise Mistake(str(error)) from error
    return maps[0]


def average_map(maps: torch.Tensor, query: int | None) -> np.ndarray:
    """(rows, columns) of one query, or of all."""
    return (maps.mean(0) if query is None else maps[query]).cpu().numpy()


def drawn(part: Part, image: Image.Image, heats: list[np.ndarray], strongest: float | None = None) -> list[Image.Image]:
    """Each map (rows, columns) over the picture as the model sees it."""
    picture = part.processor.seen_picture(image)
    return [part.processor.draw_attention(picture, heat, strongest) for heat in heats]


def word_weights(
    part: Part, image: Image.Image, prompt: str, settings: Settings, stop: threading.Event
) -> tuple[list[str], torch.Tensor]:
    """A caption's words, and how much each, when written, attended to each query: (words, Q), rows summing to 1."""
    queries = part.model.config.num_query_tokens
    options = {"output_attentions": True, "return_dict_in_generate": True, "stopping_criteria": [StopWhenTold(stop)]}
    if part.has_language_model:
        inputs = prompt_inputs(part, image, prompt)
        columns = (inputs["input_ids"][0] == part.model.config.image_token_index).nonzero()[:, 0]
        arguments = settings.generation_arguments(room_left(part, inputs))
        out = part.model.generate(**inputs, **arguments, **options)
    else:
        columns = torch.arange(queries)
        arguments = settings.generation_arguments(room_of(part) - 1)
        out = part.model.generate(vision_embeds=part.see([image]), **arguments, **options)
    steps = out.cross_attentions if part.model.config.is_encoder_decoder else out.attentions
    new = out.sequences[0, out.sequences.shape[1] - len(steps) :]
    weights = torch.stack(
        [torch.stack([w[0, :, -1].float().mean(0) for w in step])[:, columns].mean(0) for step in steps]
    )
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
    return words_of(part.processor.tokenizer, new.tolist(), weights)


def words_of(tokenizer, ids: list[int], weights: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    """Tokens put together to words, their weights averaged; special tokens left out."""
    text, pieces = "", []  # (number of the word, piece, row)
    number = -1
    for row, token in enumerate(ids):
        if token in tokenizer.all_special_ids:
            continue
        longer = tokenizer.decode([i for i in ids[: row + 1] if i not in tokenizer.all_special_ids])
        piece = longer[len(text) :]
        if number < 0 or piece[:1].isspace() or text[-1:].isspace():
            number += 1
        pieces.append((number, piece, row))
        text = longer
    words = [list(group) for _, group in groupby(pieces, key=lambda piece: piece[0])]
    names = ["".join(piece for _, piece, _ in word).strip() for word in words]
    means = [weights[[row for _, _, row in word]].mean(0) for word in words]
    return names, torch.stack(means) if means else weights[:0]


def texts_of_queries(part: Part, image: Image.Image, prompt: str) -> dict[str, torch.Tensor]:
    """What instruction-aware queries read of the prompt; nothing for others."""
    if not part.has_language_model:
        return {}
    return {name: value for name, value in prompt_inputs(part, image, prompt).items() if name.startswith("qformer_")}


def word_overlays(
    part: Part, image: Image.Image, prompt: str, settings: Settings, layer, head, stop: threading.Event
) -> list[tuple[Image.Image, str]]:
    """[(overlay, word), ...] of a greedy caption. All words share one scale, so that they can be compared."""
    words, weights = word_weights(part, image, prompt, settings, stop)
    maps = query_maps(part, image, layer, head, texts_of_queries(part, image, prompt)).to(weights.device)
    heats = torch.einsum("wq,qrc->wrc", weights, maps).cpu().numpy()
    # Subtract what all words share (places that every query watches): what is left is due to the word.
    heats = (heats - heats.mean(0, keepdims=True)).clip(0) if len(words) > 1 else heats
    strongest = float(heats.max()) if len(words) else None
    return list(zip(drawn(part, image, list(heats), strongest), words))
