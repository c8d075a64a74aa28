"""From dataset items to batches named as the model's arguments."""

from dataclasses import dataclass
from typing import Any

import torch

from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xProcessor
from modeling_blip2x.language_blip2x import IGNORE
from modeling_blip2x.plain_words_blip2x import PlainWords
from modeling_blip2x.text_layout_blip2x import TextLayout

from .pixels import finished, levels_of


def collate_images(
    items: list[dict], image_processor: Any, cropped: bool, levels: bool = False
) -> dict[str, torch.Tensor]:
    """`pixel_values` (B, 3, H, W), or `vision_embeds` (B, N, D) where the items come from a feature cache.

    Images that augmentation has cropped to their size are only rescaled and normalised; with `levels` that is left to
    `pixels.finished`, and the batch holds a quarter of the bytes.
    """
    if "vision_embeds" in items[0]:
        return {"vision_embeds": torch.stack([item["vision_embeds"] for item in items])}
    images = [item["image"] for item in items]
    if cropped:
        batch = levels_of(images, image_processor)
        return batch if levels else finished(batch)
    return {"pixel_values": image_processor(images=images, return_tensors="pt")["pixel_values"]}


def collate_prompts(items: list[dict], qformer_tokenizer: Any | None, max_length: int) -> dict[str, torch.Tensor]:
    """What the Q-Former reads, where it reads: the prompt of each row, as the processor gives it in generation."""
    if qformer_tokenizer is None:
        return {}
    encoded = encode_for_qformer(qformer_tokenizer, [item["prompt"] for item in items], max_length)
    return {"qformer_input_ids": encoded["input_ids"], "qformer_attention_mask": encoded["attention_mask"]}


def encode_for_qformer(tokenizer: Any, texts: list[str], max_length: int) -> Any:
    """Texts as [CLS] text [SEP] with attention_mask, (B, longest), padded on the right; special tokens are words."""
    options = {"padding": "longest", "padding_side": "right", "truncation": True, "max_length": max_length}
    return PlainWords(tokenizer).batch(texts, **options, return_tensors="pt")


def pad(rows: list[list[int]], value: int, on_left: bool = False) -> torch.Tensor:
    """(B, longest) from id lists."""
    longest = max(len(row) for row in rows)
    fillers = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([filler + row if on_left else row + filler for row, filler in zip(rows, fillers)])


def filler_of(tokenizer: Any) -> int:
    """Id that rows are padded with, always under a mask of 0."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id)
    return next(token for token in known if token is not None)


@dataclass
class Stage1Collator:
    """Images with captions as [CLS] text [SEP], padded to the longest of the batch.

    `image_ids` tell the losses which rows show the same image. levels: see `collate_images`.
    """

    image_processor: Any
    tokenizer: Any
    max_text_length: int
    cropped: bool
    levels: bool = False

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        text = self.encode([item["text"] for item in items])
        return {
            **collate_images(items, self.image_processor, self.cropped, self.levels),
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "image_ids": torch.tensor([item["image_id"] for item in items]),
        }

    def encode(self, texts: list[str]) -> Any:
        """input_ids and attention_mask (B, longest) of texts, cut to `max_text_length`."""
        return encode_for_qformer(self.tokenizer, texts, self.max_text_length)

    def length(self, prompt: str, text: str) -> int:
        """Tokens of a text with those around it, of which `max_text_length` are kept."""
        return len(PlainWords(self.tokenizer).batch([text])["input_ids"][0])


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
    qformer_positions: int = 512
    levels: bool = False

    def __post_init__(self):
        self.layout = language_layout(self, is_encoder_decoder=False)

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        input_ids, labels = zip(*[self.encode(item["prompt"], item["text"]) for item in items])
        lengths = [len(ids) for ids in input_ids]
        mask = [[1] * length for length in lengths]
        return {
            **collate_images(items, self.image_processor, self.cropped, self.levels),
            **collate_prompts(items, self.qformer_tokenizer, min(self.max_text_length, self.qformer_positions)),
            "input_ids": pad(list(input_ids), filler_of(self.tokenizer)),
            "attention_mask": pad(mask, 0),
            "labels": pad(list(labels), IGNORE),
        }

    def encode(self, prompt: str, text: str) -> tuple[list[int], list[int]]:
        """Input ids and labels of one row; `max_text_length` counts prompt, text and end.

        Where they do not fit, a prompt longer than half of it loses its first words, then the text its last ones.
        """
        given, target = self.layout.ids(prompt), self.layout.continuation(prompt, text)
        around = len(self.layout.before)
        room = max(self.max_text_length - len(target) - 1, self.max_text_length // 2) - around
        before = self.layout.enclosed(given[-room:] if room > 0 else [])
        target = self.layout.closed(target, self.max_text_length - len(before) + self.num_query_tokens)
        return before + target, [IGNORE] * len(before) + target

    def answer(self, prompt: str, text: str) -> tuple[list[int], list[int]]:
        """Input ids and labels of a text to score after a prompt, which may be empty."""
        return self.encode(prompt, text)

    def length(self, prompt: str, text: str) -> int:
        """Tokens of prompt, text and end, of which `max_text_length` are kept."""
        return len(self.layout.before) + len(self.layout.ids(f"{prompt} {text}" if prompt else text)) + 1

    def prompts(self, items: list[dict]) -> dict[str, torch.Tensor]:
        """What `generate` goes on from: image and prompt of each row, padded on the left."""
        return prompt_batch(self, items)


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
    qformer_positions: int = 512
    levels: bool = False

    def __post_init__(self):
        self.layout = language_layout(self, is_encoder_decoder=True)

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        inputs, labels = zip(*[self.encode(item["prompt"], item["text"], item["draw"]) for item in items])
        mask = [[1] * len(ids) for ids in inputs]
        return {
            **collate_images(items, self.image_processor, self.cropped, self.levels),
            **collate_prompts(items, self.qformer_tokenizer, min(self.max_text_length, self.qformer_positions)),
            "input_ids": pad(list(inputs), filler_of(self.tokenizer)),
            "attention_mask": pad(mask, 0),
            "labels": pad(list(labels), IGNORE),
        }

    def encode(self, prompt: str, text: str, draw: float) -> tuple[list[int], list[int]]:
        """Encoder ids and labels of one row; `draw` in [0, 1) picks the split."""
        words = self.layout.ids(text)
        target = self.layout.closed(words, self.max_text_length - len(self.layout.opening))
        if prompt:
            prefix = self.layout.ids(prompt)[: self.max_text_length - 1]
        else:
            midpoint = min(len(words), self.max_text_length) // 2
            split = min(1 + int(draw * midpoint), midpoint)  # 1 .. midpoint; 0 for a text of one token
            prefix, target = target[:split], target[split:]
        return self.layout.enclosed(prefix), [*self.layout.opening, *target]

    def answer(self, prompt: str, text: str) -> tuple[list[int], list[int]]:
        """Input ids and labels of a text to score after a prompt, which may be empty."""
        return self.layout.prompt(prompt), [*self.layout.opening, *self.layout.ids(text), self.layout.end]

    def length(self, prompt: str, text: str) -> int:
        """Tokens of the text with what is around it, or of the prompt if that is longer; `max_text_length` are kept."""
        written = len(self.layout.opening) + len(self.layout.ids(text)) + 1
        return max(written, len(self.layout.ids(prompt)) + 1)

    def prompts(self, items: list[dict]) -> dict[str, torch.Tensor]:
        """What `generate` reads: image and prompt of each row."""
        return prompt_batch(self, items)


def language_layout(collator: CausalLMCollator | Seq2SeqLMCollator, is_encoder_decoder: bool) -> TextLayout:
    """The layout of a collator's texts. Raises ValueError for a tokenizer that names no end token."""
    layout = TextLayout(collator.tokenizer, collator.image_token_id, collator.num_query_tokens, is_encoder_decoder)
    if layout.end is None:
        raise ValueError(
            "The language model's tokenizer names no token that ends a text (eos_token or sep_token). Set its eos_token; "
            "in training, --end_token does."
        )
    return layout


def prompt_batch(collator: CausalLMCollator | Seq2SeqLMCollator, items: list[dict]) -> dict[str, torch.Tensor]:
    """Images and the ids of their prompts as arguments of `generate`."""
    rows = [collator.layout.prompt(item["prompt"]) for item in items]
    return {
        **collate_images(items, collator.image_processor, collator.cropped),
        **collate_prompts(items, collator.qformer_tokenizer, min(collator.max_text_length, collator.qformer_positions)),
        "input_ids": pad(rows, filler_of(collator.tokenizer), on_left=True),
        "attention_mask": pad([[1] * len(row) for row in rows], 0, on_left=True),
    }


def language_collator(
    model: Blip2xForConditionalGeneration,
    processor: Blip2xProcessor,
    max_text_length: int,
    cropped: bool,
    levels: bool = False,
) -> CausalLMCollator | Seq2SeqLMCollator:
    """The collator of a model's kind of language model; the processor lays prompts out as that kind, too."""
    if processor.is_encoder_decoder is None:
        processor.is_encoder_decoder = model.config.is_encoder_decoder
    kind = Seq2SeqLMCollator if model.config.is_encoder_decoder else CausalLMCollator
    positions = getattr(model.config.text_config, "max_position_embeddings", None)
    if positions is not None:
        max_text_length = min(max_text_length, positions - model.config.num_query_tokens)
    return kind(
        processor.image_processor,
        processor.tokenizer,
        processor.num_query_tokens,
        processor.image_token_id,
        max_text_length,
        cropped,
        processor.qformer_tokenizer,
        model.config.qformer_config.max_position_embeddings,
        levels,
    )
