"""Processor: images and text in, the tensors of a forward out.

A stage-1 processor (`num_query_tokens=None`) feeds the Q-Former: text is padded on the right, and the tokenizer gets
[DEC] as BOS where it has none. A stage-2 processor feeds the language model: Q image tokens stand for each image, before
BOS as in the official model or where the text has its `<image>` (see tokenizing_blip2x.py), and padding is on the left,
where it never comes between prompt and answer.

The caller's tokenizer is never changed: the processor works on a copy.
"""

import copy
import os
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, Unpack
from transformers.tokenization_utils_base import AddedToken

from .arguments_blip2x import NOT_OF_PROMPTS, TEXT_ARGUMENTS, refuse, split_arguments
from .attention_maps_blip2x import overlay, picture_of
from .decoding_blip2x import decode_until, id_lists, without_prompts
from .imagelists_blip2x import list_images, open_image
from .plain_words_blip2x import PlainWords
from .text_layout_blip2x import TextLayout
from .tokenizing_blip2x import encode_captions, encode_for_qformer, encode_prompts, images_by_text, list_texts

IMAGE_TOKEN = "<image>"
DEC_TOKEN = "[DEC]"
QFORMER_TOKENIZER = "qformer_tokenizer"  # its folder in a checkpoint
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "trust_remote_code")
# Images of a message go before its question, as in training, but those between its texts stay where they are.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set ns = namespace(all='', words='', images='') -%}"
    "{%- if message['content'] is string -%}{%- set ns.all = message['content'] -%}{%- set ns.words = ns.all -%}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set ns.all = ns.all + '<image>' -%}{%- set ns.images = ns.images + '<image>' -%}"
    "{%- elif part['type'] == 'text' -%}{%- set ns.all = ns.all + part['text'] -%}"
    "{%- set ns.words = ns.words + part['text'] -%}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- if ns.all == ns.images + ns.words or ns.all == ns.words + ns.images -%}{{ ns.images }}{%- set text = ns.words -%}"
    "{%- else -%}{%- set text = ns.all -%}{%- endif -%}"
    "{{ '' if loop.first else ' ' }}"
    "{%- if message['role'] == 'user' -%}{{ 'Question: ' + text + ' Answer:' }}{%- else -%}{{ text + '.' }}{%- endif -%}"
    "{%- endfor -%}"
)


class Blip2xProcessor(ProcessorMixin):
    """Image processor and tokenizer(s) of a BLIP-2 model.

    Args:
        image_processor: of the vision tower.
        tokenizer: the Q-Former's (stage 1) or the language model's (stage 2).
        qformer_tokenizer: stage 2 only, where the Q-Former reads the text too.
        num_query_tokens: queries of the stage-2 model, the number of placeholders an image takes; None for stage 1.
        is_encoder_decoder: of the language model, which decides whether its prompts end (see text_layout_blip2x.py); None
            where it is not known.
    """

    def __init__(
        self,
        image_processor,
        tokenizer,
        qformer_tokenizer=None,
        num_query_tokens: int | None = None,
        chat_template=None,
        is_encoder_decoder: bool | None = None,
    ):
        tokenizer = copy.deepcopy(tokenizer)
        if num_query_tokens is None:
            if tokenizer.bos_token is None:
                tokenizer.add_special_tokens({"bos_token": DEC_TOKEN})
            tokenizer.padding_side = "right"
            # Whoever calls the tokenizer itself reads `[SEP]` in a caption as words too.
            tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True
        else:
            tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
            tokenizer.padding_side = "left"
            if tokenizer.eos_token is None and tokenizer.sep_token is not None:
                tokenizer.eos_token = tokenizer.sep_token  # texts of BERT's tokenizers end there
            chat_template = chat_template or CHAT_TEMPLATE
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token  # Llama and GPT-2 have none; masked anyway
        self.num_query_tokens, self.is_encoder_decoder = num_query_tokens, is_encoder_decoder
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
        """pixel_values (images, 3, height, width); input_ids and attention_mask (texts, L), image tokens included; for a
        stage-2 processor with a Q-Former tokenizer also qformer_input_ids and qformer_attention_mask (images, L').

        Args:
            images: one image (PIL, array, tensor, path, address, bytes, ...), a list of images, or for each text a list of
                its images: [[a, b], [c], []].
            text: one string or a list. `<image>` says where an image goes; the images of a text without it go first. A
                flat list of images is dealt out by the `<image>`s of the texts, or one image to each text. Other special
                tokens that a text spells are words, but for those that a chat template of the checkpoint's own writes.
            kwargs: arguments of transformers' tokenizers and image processors, also in groups (text_kwargs,
                images_kwargs). split_special_tokens=True makes all of them words, `<image>` too, and False none.
                max_length is that of input_ids, image tokens included; only words are ever cut. Stage 1
                hands all of the text's to the tokenizer.

        Raises:
            ValueError: nothing given; images and texts, or a text's images and its `<image>`s, that differ in number; None
                or something unreadable for an image; a max_length without room for the images; an argument that has no
                meaning here.
            TypeError: an argument that is unknown or given twice, or something that is no image.
        """
        text_options, image_options = self._options(kwargs)
        images, nested = ([], False) if images is None else list_images(images)
        texts = None if text is None else list_texts(text, text_options.get("is_split_into_words", False))
        if not images and texts is None:
            raise ValueError("Pass images, text, or both: both are None or empty.")
        features = self._encode_images(images, nested, image_options)
        if self.num_query_tokens is None:
            if texts is not None:
                features |= encode_captions(self.tokenizer, texts, text_options)
        else:
            features |= self._encode_prompts(texts, images, nested, text_options)
        return BatchFeature(
            features,
            tensor_type=text_options.get("return_tensors") or image_options.get("return_tensors"),
            skip_tensor_conversion=self.skip_tensor_conversion,
        )

    def _options(self, kwargs: dict) -> tuple[dict, dict]:
        """Arguments for the text, over the defaults that came with the tokenizer, and for the images."""
        takes = getattr(self.image_processor, "valid_kwargs", ImagesKwargs)
        of_text, of_images = split_arguments(kwargs, {*takes.__annotations__, *ImagesKwargs.__annotations__})
        kept = TEXT_ARGUMENTS - {"split_special_tokens"}  # what counts is said here, not by how a tokenizer was saved
        settings = {name: value for name, value in self.tokenizer.init_kwargs.items() if name in kept}
        defaults = {name: getattr(self.tokenizer, name, value) for name, value in settings.items() if value is not None}
        if "max_length" in defaults and "max_length" not in of_text:
            defaults.setdefault("truncation", False)  # only a caller's max_length means by itself that texts are cut
            asked = defaults | of_text
            if not asked["truncation"] and asked.get("padding") != "max_length":
                del defaults["max_length"]  # left in the tokenizer by training; it would have no effect but a warning
        return defaults | of_text, of_images

    def _encode_images(self, images: list, nested: bool, options: dict) -> dict:
        """pixel_values of images in order of appearance; nothing where there is no image."""
        # Levels that are not to be rescaled, or a layout that is named, are the caller's own.
        as_they_are = options.get("do_rescale") is False or "input_data_format" in options
        if nested:
            names = [f"images[{row}][{number}]" for row, found in enumerate(images) for number in range(len(found))]
            images = [image for found in images for image in found]
        else:
            names = [f"images[{number}]" for number in range(len(images))]
        if not images:
            return {}
        opened = [open_image(image, name, as_they_are) for image, name in zip(images, names)]
        return dict(self.image_processor(opened, **options))

    def _encode_prompts(self, texts: list[str] | None, images: list, nested: bool, options: dict) -> dict:
        """input_ids and their like for a language model, and what the Q-Former reads."""
        refuse(options, NOT_OF_PROMPTS)
        has_text = texts is not None
        texts = texts if has_text else [""] * len(images)
        layout = self.text_layout
        special = [] if options.get("split_special_tokens") else [IMAGE_TOKEN, *self._written_by_template(layout)]
        token = special[0] if special else ""
        counts = images_by_text(texts, images, nested, token, self.num_query_tokens)
        features = encode_prompts(layout, texts, counts, special, options)
        if has_text and self.qformer_tokenizer is not None and any(counts):
            features |= encode_for_qformer(self.qformer_tokenizer, texts, counts, token, options)
        return features

    @property
    def text_layout(self) -> TextLayout:
        """Where texts of the language model begin and end, for a stage-2 processor."""
        return TextLayout(self.tokenizer, self.image_token_id, self.num_query_tokens, self.is_encoder_decoder)

    @property
    def has_own_chat_template(self) -> bool:
        """Whether a stage-2 checkpoint brings a chat template other than the one here, which writes no special tokens."""
        return self.num_query_tokens is not None and self.chat_template != CHAT_TEMPLATE

    def _written_by_template(self, layout: TextLayout) -> list[str]:
        """Special tokens that the chat template writes, such as `<|im_start|>`, by themselves or by name."""
        if not self.has_own_chat_template:
            return []
        template = str(self.chat_template)
        named = {value for name, value in self.tokenizer.special_tokens_map.items() if name in template}
        return [token for token in layout.words.special if token in template or token in named]

    def apply_chat_template(self, conversation, chat_template=None, processor_kwargs=None, **kwargs):
        """As in transformers. Special tokens are those that the template writes; what a message spells are words."""
        if chat_template is not None and kwargs.get("tokenize"):
            processor_kwargs = {"split_special_tokens": False, **(processor_kwargs or {})}
        if chat_template is not None or self.has_own_chat_template:
            conversation = _without_special(conversation, PlainWords(self.tokenizer))
        return super().apply_chat_template(conversation, chat_template, processor_kwargs=processor_kwargs, **kwargs)

    def batch_decode_new(self, ids, input_ids=None) -> list[str]:
        """Text that `generate` wrote after the prompt, up to the end token, for models of every kind.

        Args:
            ids: what generate returned: ids (B * return sequences, L), or its output with return_dict_in_generate.
            input_ids: (B, L) of the prompt. A decoder-only model's ids begin with it, and it is taken off; an
                encoder-decoder's do not. None for stage 1, which has no prompt.

        Both may be tensors, arrays or lists.
        """
        given = id_lists(ids["sequences"] if isinstance(ids, Mapping) else ids)
        end = self.tokenizer.sep_token_id if self.num_query_tokens is None else self.tokenizer.eos_token_id
        new = given if input_ids is None else without_prompts(given, id_lists(input_ids))
        if new is given:  # an encoder-decoder's: some, as BART, start decoding from the end token
            new = [row[1:] if row[:1] == [end] else row for row in new]
        return decode_until(self.tokenizer, new, end)

    def seen_picture(self, image: object, side: int = 480) -> Image.Image:
        """An image as the model sees it: resized and cropped, its colours as they were; the longer side `side` pixels long."""
        pixels = self._encode_images([image], False, {"return_tensors": "pt"})["pixel_values"][0]
        return picture_of(pixels.float().cpu().numpy(), self.image_processor, side)

    @staticmethod
    def draw_attention(
        picture: Image.Image, heat: torch.Tensor | np.ndarray, strongest: float | None = None
    ) -> Image.Image:
        """A map (rows, columns) of the model's `query_attention` as heat over the picture, as large as the picture.

        Args:
            picture: of `seen_picture`, whose places are those of the map.
            heat: of one query, or a mean or weighted sum of several.
            strongest: the value that is drawn hottest, the map's own maximum by default. Maps that are to be compared
                need the same one.
        """
        return overlay(picture, heat, strongest)

    # transformers' processors hold and save every component of their signature. The Q-Former's tokenizer may be absent,
    # so it is kept, saved and loaded here.

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """As in transformers; kwargs are those of `push_to_hub`, with repo_id, the folder's name by default."""
        written = super().save_pretrained(save_directory)
        if self.qformer_tokenizer is not None:
            self.qformer_tokenizer.save_pretrained(os.path.join(save_directory, QFORMER_TOKENIZER))
        if push_to_hub:  # which saves all components to a folder of its own
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory))), **kwargs)
        return written

    def to_dict(self) -> dict:
        bare = copy.copy(self)
        bare.qformer_tokenizer = None
        output = super(Blip2xProcessor, bare).to_dict()
        del output["qformer_tokenizer"]
        return output | {"has_qformer_tokenizer": self.qformer_tokenizer is not None}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As in transformers."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        settings, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if settings.get("has_qformer_tokenizer"):
            processor = loaded[0] if isinstance(loaded, tuple) else loaded
            where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            folder = os.path.join(kwargs.get("subfolder", ""), QFORMER_TOKENIZER)
            processor.qformer_tokenizer = AutoTokenizer.from_pretrained(
                pretrained_model_name_or_path, subfolder=folder, **where
            )
        return loaded

    @property
    def model_input_names(self) -> list[str]:
        names = ["pixel_values", "input_ids", "attention_mask"]
        return names + (["qformer_input_ids", "qformer_attention_mask"] if self.qformer_tokenizer is not None else [])


def _without_special(part, words: PlainWords):
    """Messages, or a part of one, with a space in each special token that a text spells, but `<image>`."""
    if isinstance(part, str):
        return words.broken(part, [IMAGE_TOKEN])[0]
    if isinstance(part, (list, tuple)):
        return [_without_special(one, words) for one in part]
    if isinstance(part, Mapping):
        return {
            name: _without_special(value, words) if name in ("content", "text") else value
            for name, value in part.items()
        }
    return part


__all__ = ["Blip2xProcessor"]
