"""From dataset items to batches named as the model's arguments."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xProcessor
from modeling_blip2x.language_blip2x import IGNORE


def collate_images(items: list[dict], image_processor: Any, cropped: bool) -> dict[str, torch.Tensor]:
    """`pixel_values` (B, 3, H, W), or `vision_embeds` (B, N, D) where the items come from a feature cache.

    Images that augmentation has cropped to their size are only rescaled and normalised.
    """
    if "vision_embeds" in items[0]:
        return {"vision_embeds": torch.stack([item["vision_embeds"] for item in items])}
    images = [item["image"] for item in items]
    if cropped:
        return {"pixel_values": normalise(images, image_processor)}
    return {"pixel_values": image_processor(images=images, return_tensors="pt")["pixel_values"]}


def normalise(crops: list[torch.Tensor], image_processor: Any) -> torch.Tensor:
    """Crops (3, H, W) of RGB levels as pixels (B, 3, H, W): rescaled and normalised by an image processor, not resized.

    The processor is shown each of the 256 levels once, not every pixel: that is five times as fast, and the same bits.
    """
    as_they_are = {"do_resize": False, "do_center_crop": False}
    levels = Image.fromarray(np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, axis=2))
    table = np.asarray(image_processor(images=[levels], return_tensors="np", **as_they_are)["pixel_values"][0, :, :, 0])
    plain = image_processor(
        images=[crop.numpy() for crop in crops], do_rescale=False, do_normalize=False, **as_they_are
    )
    pixels = np.empty((len(crops), *crops[0].shape), table.dtype)
    for target, image in zip(pixels, plain["pixel_values"]):
        for channel in range(3):
            # Every level is in the table; numpy would first copy `out` in the mode that checks it.
            np.take(table[channel], image[channel], out=target[channel], mode="clip")
    return torch.from_numpy(pixels)


def collate_prompts(items: list[dict], qformer_tokenizer: Any | None, max_length: int) -> dict[str, torch.Tensor]:
    """What the Q-Former reads, where it reads: the prompt of each row, as the processor gives it in generation."""
    if qformer_tokenizer is None:
        return {}
    prompts = [item["prompt"] for item in items]
    encoded = qformer_tokenizer(
        prompts, padding="longest", truncation=True, max_length=max_length, padding_side="right", return_tensors="pt"
    )
    return {"qformer_input_ids": encoded["input_ids"], "qformer_attention_mask": encoded["attention_mask"]}


def pad(rows: list[list[int]], value: int, on_left: bool = False) -> torch.Tensor:
    """(B, longest) from id lists."""
    longest = max(len(row) for row in rows)
    fillers = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([filler + row if on_left else row + filler for row, filler in zip(rows, fillers)])


def filler_of(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def cut(ids: list[int], end: int, max_length: int) -> list[int]:
    """`ids` and the end token, or the first `max_length` ids: a text that was cut does not end there."""
    return [*ids, end] if len(ids) < max_length else ids[:max_length]


@dataclass
class Stage1Collator:
    """Images with captions as [CLS] text [SEP], padded to the longest of the batch.

    `image_ids` tell the losses which rows show the same image.
    """

    image_processor: Any
    tokenizer: Any
    max_text_length: int
    cropped: bool

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        text = self.tokenizer(
            [item["text"] for item in items],
            padding="longest",
            padding_side="right",
            truncation=True,
            max_length=self.max_text_length,
            return_tensors="pt",
        )
        return {
            **collate_images(items, self.image_processor, self.cropped),
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "image_ids": torch.tensor([item["image_id"] for item in items]),
        }


@dataclass
class CausalLMCollator:
    """Stage 2 with a decoder-only LLM: image tokens, prompt, text, end. Text and end are supervised."""

    image_processor: Any
    tokenizer: Any
    num_query_tokens: int
    image_token_id: int
    max_text_length: int
    cropped: bool
    qformer_tokenizer: Any | None = None

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        input_ids, labels = zip(*[self.encode(item["prompt"], item["text"]) for item in items])
        lengths = [len(ids) for ids in input_ids]
        mask = [[1] * length for length in lengths]
        return {
            **collate_images(items, self.image_processor, self.cropped),
            **collate_prompts(items, self.qformer_tokenizer, self.max_text_length),
            "input_ids": pad(list(input_ids), filler_of(self.tokenizer)),
            "attention_mask": pad(mask, 0),
            "labels": pad(list(labels), IGNORE),
        }

    def encode(self, prompt: str, text: str) -> tuple[list[int], list[int]]:
        """Input ids and labels of one row; `max_text_length` counts prompt, text and end.

        Where they do not fit, a prompt longer than half of it loses its beginning, then the text its end.
        """
        prompt_ids = self.encode_prompt(prompt)
        whole = without_end(self.tokenizer(f"{prompt} {text}" if prompt else text)["input_ids"], self.tokenizer)
        # The tokenizer may join the prompt's end with the text's start: supervise from the first token that differs.
        start = next((i for i, (a, b) in enumerate(zip(prompt_ids, whole)) if a != b), min(len(prompt_ids), len(whole)))
        target = [*whole[start:], self.tokenizer.eos_token_id]
        room = max(self.max_text_length - len(target), self.max_text_length // 2)
        before = whole[:start] if start <= room else whole[start - room : start]
        target = target[: self.max_text_length - len(before)]  # a text that was cut does not end there
        images = [self.image_token_id] * self.num_query_tokens
        return images + before + target, [IGNORE] * (len(images) + len(before)) + target

    def answer(self, prompt: str, text: str) -> tuple[list[int], list[int]]:
        """Input ids and labels of a text to score after a prompt, which may be empty."""
        return self.encode(prompt, text)

    def encode_prompt(self, prompt: str) -> list[int]:
        return without_end(self.tokenizer(prompt)["input_ids"], self.tokenizer)

    def prompts(self, items: list[dict]) -> dict[str, torch.Tensor]:
        """What `generate` goes on from: image and prompt of each row, padded on the left."""
        return prompt_batch(self, items, [self.encode_prompt(item["prompt"]) for item in items])


@dataclass
class Seq2SeqLMCollator:
    """Stage 2 with an encoder-decoder LLM: image tokens and prompt to the encoder, text and end to the decoder.

    Without a prompt this is prefix language modelling (section 3.2): the text is split at a random point between its
    first token and its midpoint, the prefix goes to the encoder, the suffix to the decoder.
    """

    image_processor: Any
    tokenizer: Any
    num_query_tokens: int
    image_token_id: int
    max_text_length: int
    cropped: bool
    qformer_tokenizer: Any | None = None

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        inputs, labels = zip(*[self.encode(item["prompt"], item["text"], item["draw"]) for item in items])
        mask = [[1] * len(ids) for ids in inputs]
        return {
            **collate_images(items, self.image_processor, self.cropped),
            **collate_prompts(items, self.qformer_tokenizer, self.max_text_length),
            "input_ids": pad(list(inputs), self.tokenizer.pad_token_id),
            "attention_mask": pad(mask, 0),
            "labels": pad(list(labels), IGNORE),
        }

    def encode(self, prompt: str, text: str, draw: float) -> tuple[list[int], list[int]]:
        """Encoder ids and labels of one row; `draw` in [0, 1) picks the split."""
        end = self.tokenizer.eos_token_id
        text_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        target = cut(text_ids, end, self.max_text_length)
        if prompt:
            prefix = self.tokenizer(prompt, add_special_tokens=False)["input_ids"][: self.max_text_length - 1]
        else:
            midpoint = min(len(text_ids), self.max_text_length) // 2
            split = min(1 + int(draw * midpoint), midpoint)  # 1 .. midpoint; 0 for a text of one token
            prefix, target = target[:split], target[split:]
        return [self.image_token_id] * self.num_query_tokens + prefix + [end], target

    def answer(self, prompt: str, text: str) -> tuple[list[int], list[int]]:
        """Input ids and labels of a text to score after a prompt, which may be empty."""
        prefix = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        target = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return [self.image_token_id] * self.num_query_tokens + [*prefix, end], [*target, end]

    def prompts(self, items: list[dict]) -> dict[str, torch.Tensor]:
        """What `generate` reads: image and prompt of each row."""
        rows = [self.tokenizer(item["prompt"], add_special_tokens=False)["input_ids"] for item in items]
        return prompt_batch(self, items, [[*row, self.tokenizer.eos_token_id] for row in rows])


def prompt_batch(
    collator: CausalLMCollator | Seq2SeqLMCollator, items: list[dict], prompts: list[list[int]]
) -> dict[str, torch.Tensor]:
    """Images and the ids of their prompts as arguments of `generate`."""
    rows = [[collator.image_token_id] * collator.num_query_tokens + prompt for prompt in prompts]
    return {
        **collate_images(items, collator.image_processor, collator.cropped),
        **collate_prompts(items, collator.qformer_tokenizer, collator.max_text_length),
        "input_ids": pad(rows, filler_of(collator.tokenizer), on_left=True),
        "attention_mask": pad([[1] * len(row) for row in rows], 0, on_left=True),
    }


def without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Drop the end token that some tokenizers add to every text."""
    return (
        ids[:-1]
        if ids and ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id != tokenizer.bos_token_id
        else ids
    )


def language_collator(
    model: Blip2xForConditionalGeneration, processor: Blip2xProcessor, max_text_length: int, cropped: bool
) -> CausalLMCollator | Seq2SeqLMCollator:
    """The collator of a model's kind of language model."""
    kind = Seq2SeqLMCollator if model.config.is_encoder_decoder else CausalLMCollator
    return kind(
        processor.image_processor,
        processor.tokenizer,
        processor.num_query_tokens,
        processor.image_token_id,
        max_text_length,
        cropped,
        processor.qformer_tokenizer,
    )
