"""Processor: images and text in, the tensors of a forward out.

A stage-1 processor (`num_query_tokens=None`) feeds the Q-Former: text is padded on the right, and the tokenizer gets
[DEC] as BOS where it has none. A stage-2 processor feeds the language model: Q `<image>` placeholders stand before BOS,
as in the official model, and padding is on the left, where it never comes between prompt and answer.

The caller's tokenizer is never changed: the processor works on a copy.
"""

import copy
import os

import torch
from PIL import Image, ImageOps
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs, Unpack
from transformers.tokenization_utils_base import AddedToken

IMAGE_TOKEN = "<image>"
DEC_TOKEN = "[DEC]"
QFORMER_TOKENIZER = "qformer_tokenizer"  # its folder in a checkpoint
# Arguments of a batch, or of processors that lay out their placeholders in the text, which these do not.
NOT_OF_ONE_TEXT = ("return_tensors", "text_pair", "return_mm_token_type_ids", "return_text_replacement_offsets")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set text = message['content'] -%}{%- else -%}{%- set ns = namespace(t='') -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}{{ '<image>' }}"
    "{%- elif part['type'] == 'text' -%}{%- set ns.t = ns.t + part['text'] -%}{%- endif -%}{%- endfor -%}"
    "{%- set text = ns.t -%}{%- endif -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ '' if loop.first else ' ' }}{{ 'Question: ' + text + ' Answer:' }}{%- else -%}{{ ' ' + text + '.' }}{%- endif -%}"
    "{%- endfor -%}"
)


def upright(images):
    """Turn photos the way their EXIF data says. transformers does so for paths and URLs, not for PIL images."""
    if isinstance(images, (list, tuple)):
        return [upright(image) for image in images]
    return ImageOps.exif_transpose(images) if isinstance(images, Image.Image) else images


class Blip2xProcessor(ProcessorMixin):
    """Image processor and tokenizer(s) of a BLIP-2 model.

    Args:
        image_processor: of the vision tower.
        tokenizer: the Q-Former's (stage 1) or the language model's (stage 2).
        qformer_tokenizer: stage 2 only, where the Q-Former reads the text too.
        num_query_tokens: queries of the stage-2 model, the number of placeholders an image takes; None for stage 1.
    """

    def __init__(
        self,
        image_processor,
        tokenizer,
        qformer_tokenizer=None,
        num_query_tokens: int | None = None,
        chat_template=None,
    ):
        tokenizer = copy.deepcopy(tokenizer)
        if num_query_tokens is None:
            if tokenizer.bos_token is None:
                tokenizer.add_special_tokens({"bos_token": DEC_TOKEN})
            tokenizer.padding_side = "right"
        else:
            tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
            tokenizer.padding_side = "left"
            chat_template = chat_template or CHAT_TEMPLATE
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token  # Llama and GPT-2 have none; masked anyway
        self.num_query_tokens = num_query_tokens
        self.image_token = IMAGE_TOKEN if num_query_tokens is not None else None
        self.image_token_id = None if num_query_tokens is None else tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.qformer_tokenizer = qformer_tokenizer
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images=None,
        text: str | list[str] | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """pixel_values of images; input_ids and attention_mask of texts, image placeholders included; for a stage-2
        processor with a Q-Former tokenizer also qformer_input_ids and qformer_attention_mask.

        Args:
            images: one image or a list (PIL, array, tensor, path or URL). text: one string or a list, as many as images.
                A text may say where the image goes by one `<image>`; otherwise it goes first.
            kwargs: padding, truncation, max_length, return_tensors and other arguments of transformers' processors, for
                tokenizer or image processor, checked by them. max_length is that of input_ids, image placeholders
                included; only text is ever truncated.

        Raises:
            ValueError: nothing given, several placeholders in a text, images and texts that differ in number, or a
                max_length that has no room for the image.
        """
        if images is None and text is None:
            raise ValueError("Pass images, text, or both: both are None.")
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        options = merged["text_kwargs"]
        return_tensors = options.get("return_tensors")
        features = {}
        images = None if images is None else upright(self.image_processor.fetch_images(images))
        if images is not None:
            features.update(self.image_processor(images, **merged["images_kwargs"]))
        with_placeholders = images is not None and self.num_query_tokens is not None
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            wrong = [t for t in texts if not isinstance(t, str)]
            if wrong:
                raise ValueError(
                    f"text must be a string or a list of strings, got {wrong[0]!r} ({type(wrong[0]).__name__})."
                )
            count = len(features["pixel_values"]) if images is not None else None
            if with_placeholders and count != len(texts):
                raise ValueError(
                    f"Got {count} images and {len(texts)} texts. Pass one text for each image; repeat the image to ask "
                    "several questions of it."
                )
            features.update(self._encode(texts, with_placeholders, options))
            if with_placeholders and self.qformer_tokenizer is not None:
                plain = [t.replace(IMAGE_TOKEN, "").strip() for t in texts]
                encoded = self.qformer_tokenizer(
                    plain, padding=options.get("padding", False), truncation=options.get("truncation", False)
                )
                features["qformer_input_ids"] = encoded["input_ids"]
                features["qformer_attention_mask"] = encoded["attention_mask"]
        elif with_placeholders:
            features.update(self._encode([""] * len(features["pixel_values"]), True, options))
        return BatchFeature(features, tensor_type=return_tensors)

    def _encode(self, texts: list[str], with_image: bool, options: dict) -> dict:
        options = {name: value for name, value in options.items() if name not in NOT_OF_ONE_TEXT}
        padding, max_length = options.pop("padding", False), options.pop("max_length", None)
        truncation, multiple = options.pop("truncation", False), options.pop("pad_to_multiple_of", None)
        padding_side = options.pop("padding_side", None)
        taken = self.num_query_tokens if with_image else 0
        if with_image and max_length is not None and truncation and max_length < taken:
            raise ValueError(
                f"max_length={max_length} has no room for the {taken} image tokens. Set max_length to at least {taken} "
                "plus the length of the text."
            )
        room = None if max_length is None else max_length - taken
        rows = [self._encode_one(text, with_image, truncation, room, options) for text in texts]
        batch = {name: [row[name] for row in rows] for name in rows[0]}
        if not padding:
            return batch
        offsets = batch.pop("offset_mapping", None)
        # Texts that were cut are short enough; pad, which does not know that they were, would warn.
        longest = None if truncation and padding != "max_length" else max_length
        padded = dict(
            self.tokenizer.pad(
                batch, padding=padding, max_length=longest, pad_to_multiple_of=multiple, padding_side=padding_side
            )
        )
        if offsets is not None:  # the tokenizer pads only what it knows
            on_left = (padding_side or self.tokenizer.padding_side) == "left"
            missing = [[(0, 0)] * (len(ids) - len(row)) for ids, row in zip(padded["input_ids"], offsets)]
            padded["offset_mapping"] = [pad + row if on_left else row + pad for pad, row in zip(missing, offsets)]
        return padded

    def _encode_one(self, text: str, with_image: bool, truncation: bool, room: int | None, options: dict) -> dict:
        """One text to ids. The placeholders go before BOS, or where the text has its `<image>`."""
        placeholders = [] if not with_image else [self.image_token_id] * self.num_query_tokens
        before, after, found = "", text, 0
        wants_offsets = bool(options.get("return_offsets_mapping"))
        if self.num_query_tokens is not None:
            text = text.replace(IMAGE_TOKEN * self.num_query_tokens, IMAGE_TOKEN)  # already laid out: once is enough
            found = text.count(IMAGE_TOKEN)
            if found > (1 if with_image else 0):
                raise ValueError(
                    f"The text has {found} {IMAGE_TOKEN} placeholders but there is {1 if with_image else 0} image for it: {text!r}. "
                    f"Leave {IMAGE_TOKEN} out, or write it once for the image."
                )
            if found:
                before, after = text.split(IMAGE_TOKEN)
        head = self.tokenizer(before, add_special_tokens=False, return_offsets_mapping=wants_offsets)
        head = {name: values if before.strip() else [] for name, values in head.items()}
        used = len(head["input_ids"])
        options = options | {"truncation": truncation, "max_length": None if room is None else max(room - used, 0)}
        row = self.tokenizer(after, **options)
        encoded = {
            "input_ids": head["input_ids"] + placeholders + row["input_ids"],
            "attention_mask": [1] * (used + len(placeholders)) + row["attention_mask"],
        }
        if wants_offsets:
            shift = len(before) + len(IMAGE_TOKEN) if found else 0
            behind = [(start + shift, end + shift) if end else (0, 0) for start, end in row["offset_mapping"]]
            encoded["offset_mapping"] = head["offset_mapping"] + [(0, 0)] * len(placeholders) + behind
        return encoded

    def batch_decode_new(self, ids: torch.Tensor, input_ids: torch.Tensor) -> list[str]:
        """Text that `generate` wrote after the prompt `input_ids` (B, L), for decoder-only and encoder-decoder models.

        A decoder-only model's ids begin with the prompt, an encoder-decoder's do not.
        """
        prompt = torch.as_tensor(input_ids).repeat_interleave(len(ids) // len(input_ids), dim=0).to(ids.device)
        echoed = ids.shape[1] >= prompt.shape[1] and bool((ids[:, : prompt.shape[1]] == prompt).all())
        new = ids[:, prompt.shape[1] :] if echoed else ids
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    # transformers' processors hold and save every component of their signature. The Q-Former's tokenizer may be absent,
    # so it is kept, saved and loaded here.

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    def save_pretrained(self, save_directory: str, push_to_hub: bool = False, **kwargs) -> list[str]:
        if self.qformer_tokenizer is not None:
            self.qformer_tokenizer.save_pretrained(os.path.join(save_directory, QFORMER_TOKENIZER))
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_dict(self) -> dict:
        bare = copy.copy(self)
        bare.qformer_tokenizer = None
        output = super(Blip2xProcessor, bare).to_dict()
        del output["qformer_tokenizer"]
        return output | {"has_qformer_tokenizer": self.qformer_tokenizer is not None}

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs) -> list:
        arguments = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        if (processor_dict or {}).get("has_qformer_tokenizer"):
            kwargs = kwargs | {"subfolder": os.path.join(kwargs.get("subfolder", ""), QFORMER_TOKENIZER)}
            arguments.append(AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs))
        return arguments

    @property
    def model_input_names(self) -> list[str]:
        names = ["pixel_values", "input_ids", "attention_mask"]
        return names + (["qformer_input_ids", "qformer_attention_mask"] if self.qformer_tokenizer is not None else [])


__all__ = ["Blip2xProcessor"]
