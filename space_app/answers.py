"""Captions and answers, by the models' own generate."""

import threading
from collections.abc import Iterator

import torch
from mistakes import Mistake
from models import NO_LANGUAGE_MODEL, Models, Part
from PIL import Image
from settings import MAX_TURNS, Settings, check_text
from transformers import BatchFeature
from work import StopWhenTold, streamed

UNBOUNDED = 512  # tokens of text where a language model names no limit, as T5, whose positions are relative
NEXT_QUESTION = "Question:"  # a base model that goes on writes the next question itself


def room_of(part: Part) -> int:
    """Tokens that the language model (or, in stage 1, the ITG head) can read and write together."""
    config = part.model.config
    if not part.has_language_model:
        return config.qformer_config.max_position_embeddings
    return getattr(config.text_config, "max_position_embeddings", None) or UNBOUNDED


def caption(part: Part, image: Image.Image, prompt: str, settings: Settings, stop: threading.Event) -> list[str]:
    """At most `settings.captions` captions that go on from the prompt, each once, the best first.

    Raises:
        Mistake: a prompt for a stage-1 checkpoint, or one that leaves no room.
    """
    torch.manual_seed(settings.seed)
    criteria = {"stopping_criteria": [StopWhenTold(stop)]}
    if not part.has_language_model:
        if prompt:
            raise Mistake("This checkpoint captions by its ITG head, which takes no prompt. Leave the prompt empty.")
        arguments = settings.generation_arguments(room_of(part) - 1)
        ids = part.model.generate(vision_embeds=part.see([image]), **arguments, **criteria)
        return different(part.processor.batch_decode_new(ids))
    inputs = prompt_inputs(part, image, prompt)
    arguments = settings.generation_arguments(room_left(part, inputs))
    ids = part.model.generate(**inputs, **arguments, **criteria)
    return different(part.processor.batch_decode_new(ids, inputs["input_ids"]))


def different(texts: list[str]) -> list[str]:
    """Each text once: sampling may draw one several times."""
    return list(dict.fromkeys(text.strip() for text in texts))


def prompt_inputs(part: Part, image: Image.Image, text: str, from_template: bool = False) -> BatchFeature:
    """Inputs of generate for one image and a text; the tower's features stand for the pixels.

    What a visitor writes are words, also where it spells a special token; a chat template of the checkpoint's own may
    have written some.
    """
    words = None if from_template else True
    inputs = part.processor(images=[image], text=[text], split_special_tokens=words, return_tensors="pt")
    inputs = inputs.to(part.model.device)
    del inputs["pixel_values"]
    inputs["vision_embeds"] = part.see([image])
    return inputs


def room_left(part: Part, inputs: BatchFeature) -> int:
    """Tokens that may still be written after the prompt. Raises Mistake where there is none."""
    taken = 0 if part.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    left = room_of(part) - taken
    if left < 1 or not _fits(part, inputs, 1):
        raise Mistake(f"This text is too long: the language model reads {room_of(part)} tokens. Shorten it.")
    return left


def _fits(part: Part, inputs: BatchFeature, new_tokens: int) -> bool:
    written = 0 if part.model.config.is_encoder_decoder else new_tokens
    fits = inputs["input_ids"].shape[1] + written <= room_of(part)
    if "qformer_input_ids" in inputs:
        fits &= inputs["qformer_input_ids"].shape[1] <= part.model.config.qformer_config.max_position_embeddings
    return fits


def check_history(history: object) -> list[tuple[str, str]]:
    """[(question, answer), ...] of what a client sends. Raises Mistake for anything else."""
    turns = [] if history is None else history
    if not isinstance(turns, list) or not all(isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in turns):
        raise Mistake('The history must be a list of [question, answer] pairs, such as [["what is this?", "a dog"]].')
    if len(turns) > MAX_TURNS:
        raise Mistake(f"The history has {len(turns)} turns; at most {MAX_TURNS} are taken. Start a new chat.")
    return [
        (check_text(question, "A question of the history"), check_text(answer, "An answer of the history", False))
        for question, answer in turns
    ]


def question_inputs(
    part: Part, image: Image.Image, question: str, history: list[tuple[str, str]], settings: Settings
) -> tuple[BatchFeature, int]:
    """Inputs for a question after as many of the last turns as fit, and how many of the first were left out."""
    for dropped in range(len(history) + 1):
        text = chat_text(part, question, history[dropped:])
        inputs = prompt_inputs(part, image, text, from_template=part.processor.has_own_chat_template)
        if _fits(part, inputs, settings.max_length):
            break
    return inputs, dropped


def chat_text(part: Part, question: str, history: list[tuple[str, str]]) -> str:
    """`Question: {} Answer: {}. Question: {} Answer:`, by the checkpoint's own chat template."""
    messages = []
    for asked, answered in history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered.rstrip(". ")}]
    messages.append({"role": "user", "content": question})
    if part.processor.has_own_chat_template:  # whose special tokens count, but no `<image>` of a visitor's
        token = part.processor.image_token
        for message in messages:
            message["content"] = message["content"].replace(token, f"{token[0]} {token[1:]}")
    return part.processor.apply_chat_template(messages)


def answer(
    models: Models, image: Image.Image, question: str, history: list[tuple[str, str]], settings: Settings
) -> Iterator[tuple[str, int]]:
    """The answer as it grows, and how many of the first turns had no room. Raises Mistake without a language model."""
    part = models.speaker
    if part is None:
        raise Mistake(NO_LANGUAGE_MODEL)
    dropped = 0

    def generate(streamer, stop: threading.Event) -> None:
        nonlocal dropped
        inputs, dropped = question_inputs(part, image, question, history, settings)
        torch.manual_seed(settings.seed)
        arguments = settings.generation_arguments(room_left(part, inputs))
        arguments |= {"streamer": streamer} if settings.streams else {}
        ids = part.model.generate(**inputs, **arguments, stopping_criteria=[StopWhenTold(stop)])
        if not settings.streams:
            streamer.on_finalized_text(part.processor.batch_decode_new(ids, inputs["input_ids"])[0])

    text = ""
    for text in streamed(generate, part.processor.tokenizer):
        finished = NEXT_QUESTION in text
        text = text.split(NEXT_QUESTION)[0].strip()
        yield text, dropped
        if finished:
            return
    yield text.strip(), dropped
