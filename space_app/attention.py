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
from settings import Settings
from work import StopWhenTold

AVERAGE = "average"
SHOWN_SIDE = 480  # pixels of an overlay
# From cold to hot: colour and how much of the picture it covers. Cold places stay as they are.
STOPS = (0.0, 0.35, 0.7, 1.0)
COLOURS = ((30, 20, 90), (150, 30, 130), (245, 120, 40), (255, 240, 110))
COVERS = (0.45, 0.5, 0.6, 0.75)


def shape_of(part: Part) -> tuple[list[int], int, int]:
    """Numbers of the layers that look at the image, and how many heads and queries there are."""
    config = part.model.config.qformer_config
    layers = list(range(0, config.num_hidden_layers, config.cross_attention_frequency))
    return layers, config.num_attention_heads, part.model.config.num_query_tokens


def choice(value: str | int | None, allowed: list[int], what: str) -> int | None:
    """None for "average", else the number. Raises Mistake for what the model does not have."""
    if value in (None, "", AVERAGE):
        return None
    if str(value) not in map(str, allowed):  # "3" or 3; neither 3.5 nor True
        raise Mistake(f"{what} is {value!r}; choose average or one of {', '.join(map(str, allowed))}.")
    return int(value)


@torch.no_grad()
def query_maps(part: Part, image: Image.Image, layer: int | None, head: int | None) -> torch.Tensor:
    """(Q, rows, columns): attention of every query, each summing to 1 over the tower's positions, those of no place (class
    token, registers) left out before. None averages."""
    layers, _, _ = shape_of(part)
    # From the tower's features: its own attention is not wanted, and would have to be computed the slow way.
    features = part.model.get_image_features(vision_embeds=part.see([image]), output_attentions=True)
    weights = torch.stack(features.qformer_outputs.cross_attentions)[:, 0].float()  # (layers, heads, Q, N)
    weights = weights.mean(0) if layer is None else weights[layers.index(layer)]
    weights = weights.mean(0) if head is None else weights[head]
    rows, columns = grid_of(weights.shape[-1], *part.pixels([image]).shape[-2:])
    places = weights[:, -rows * columns :]
    return (places / places.sum(-1, keepdim=True).clamp(min=1e-12)).unflatten(-1, (rows, columns))


def grid_of(positions: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a tower's positions, for an image of height x width pixels; tokens without a place come first.

    Raises:
        Mistake: no grid of this shape has so many positions.
    """
    for places in range(positions, max(positions - 17, 0), -1):  # at most a class token and 16 registers
        rows = round((places * height / width) ** 0.5)
        if rows and places % rows == 0 and abs(rows / (places // rows) - height / width) < 0.5 * height / width / rows:
            return rows, places // rows
    raise Mistake(f"The vision tower gives {positions} positions, which are no grid over the picture.")


def average_map(maps: torch.Tensor, query: int | None) -> np.ndarray:
    """(rows, columns) of one query, or of all."""
    return (maps.mean(0) if query is None else maps[query]).cpu().numpy()


def seen_picture(part: Part, image: Image.Image) -> Image.Image:
    """The picture as the model sees it: resized and cropped as its image processor does."""
    processor = part.processor.image_processor
    pixels = part.pixels([image])[0].float().cpu().numpy()  # (3, height, width)
    if getattr(processor, "do_normalize", False):
        mean, std = (np.array(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        pixels = pixels * std + mean
    shown = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))
    scale = SHOWN_SIDE / max(shown.size)
    return shown.resize((round(shown.width * scale), round(shown.height * scale)), Image.Resampling.BICUBIC)


def overlay(picture: Image.Image, heat: np.ndarray, strongest: float | None = None) -> Image.Image:
    """The heat (rows, columns) over the picture, cold to hot from 0 to `strongest` (its maximum by default)."""
    heat = heat / max(heat.max() if strongest is None else strongest, 1e-12)
    smooth = Image.fromarray(heat.astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC)
    values = np.asarray(smooth).clip(0, 1)
    colour = np.stack([np.interp(values, STOPS, [c[i] for c in COLOURS]) for i in range(3)], axis=-1)
    cover = np.interp(values, STOPS, COVERS)[..., None]
    return Image.fromarray((np.asarray(picture) * (1 - cover) + colour * cover).round().astype(np.uint8))


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


def word_overlays(
    part: Part, image: Image.Image, prompt: str, settings: Settings, layer, head, stop: threading.Event
) -> list[tuple[Image.Image, str]]:
    """[(overlay, word), ...] of a greedy caption. All words share one scale, so that they can be compared."""
    words, weights = word_weights(part, image, prompt, settings, stop)
    maps = query_maps(part, image, layer, head).to(weights.device)
    heats = torch.einsum("wq,qrc->wrc", weights, maps).cpu().numpy()
    # Subtract what all words share (places that every query watches): what is left is due to the word.
    heats = (heats - heats.mean(0, keepdims=True)).clip(0) if len(words) > 1 else heats
    picture = seen_picture(part, image)
    strongest = heats.max() if len(words) else None
    return [(overlay(picture, heat, strongest), word) for heat, word in zip(heats, words)]
