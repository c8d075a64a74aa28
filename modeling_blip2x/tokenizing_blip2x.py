"""From texts, and the number of images in each, to the input_ids of a language model.

    "<image> what is it ?"          image tokens, BOS, words        the order BLIP-2 was trained with
    "look at <image> what is it ?"  BOS, words, image tokens, words

The special tokens around the words are those of text_layout_blip2x.py; each `<image>` becomes one token in between, which
is then repeated for the Q queries of the image. Images that no word stands before come first of all. No other special
token that a text spells counts: see `split_special_tokens` in processing_blip2x.py.
"""

import re

from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TruncationStrategy

from .arguments_blip2x import OF_PROMPTS, refuse
from .plain_words_blip2x import PlainWords
from .text_layout_blip2x import TextLayout


def list_texts(text: str | list, split_into_words: bool = False) -> list:
    """A batch of texts, or of lists of words, from one or from any iterable of them. ValueError for anything else."""
    if isinstance(text, str):
        return [text]
    if isinstance(text, (bytes, dict)) or not hasattr(text, "__iter__"):
        raise ValueError(f"text must be a string or a list of strings, got {text!r} ({type(text).__name__}).")
    texts = list(text)
    if not texts:
        raise ValueError("text is an empty list. Pass a text, or None for images alone.")
    if split_into_words:
        return [texts] if isinstance(texts[0], str) else texts
    for number, one in enumerate(texts):
        if not isinstance(one, str):
            raise ValueError(
                f"text must be a string or a list of strings, but text[{number}] got {one!r} ({type(one).__name__})."
            )
        if not one.isascii():
            try:
                one.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"text[{number}] is no UTF-8: it has half of a surrogate pair, {one[error.start]!r}, at character "
                    f"{error.start}. Decode it with errors='replace', or leave it out."
                ) from error
    return texts


def encode_captions(tokenizer: PreTrainedTokenizerBase, texts: list, options: dict) -> dict[str, list]:
    """Texts for the Q-Former of stage 1: the tokenizer with all its arguments."""
    refuse(options, OF_PROMPTS)
    # The model takes no token types.
    arguments = {"return_token_type_ids": False} | {n: v for n, v in options.items() if n != "return_tensors"}
    if isinstance(arguments.get("text_pair"), str):
        arguments["text_pair"] = [arguments["text_pair"]]
    if arguments.get("is_split_into_words") or arguments.get("split_special_tokens") is False:
        return dict(tokenizer(texts, **arguments))
    return dict(PlainWords(tokenizer).batch(texts, **arguments))


def images_by_text(texts: list[str], images: list[list] | list, nested: bool, token: str, queries: int) -> list[int]:
    """How many images each text has: by nested lists of them, by the `<image>`s in the texts, else one each.

    token: what stands for an image in a text; "" where nothing does.

    Raises:
        ValueError: images and texts, or a text's images and its `<image>`s, differ in number.
    """
    found = [text.count(token) if token else 0 for text in texts]
    if nested:
        if len(images) != len(texts):
            raise ValueError(f"Got {len(images)} lists of images and {len(texts)} texts. Pass one list for each text.")
        counts = [len(row) for row in images]
    elif sum(found) == len(images):
        counts = found
    elif sum(found) == len(images) * queries and all(number % queries == 0 for number in found):
        counts = [number // queries for number in found]  # laid out already
    elif len(images) == len(texts):
        counts = [1] * len(texts)
    elif not images:
        counts = [0] * len(texts)
    else:
        raise ValueError(
            f"Got {_counted(len(images), 'image')} and {_counted(len(texts), 'text')}. Pass one text for each image, as many {token} in the texts "
            f"as images (there are {sum(found)}), or a list of images for each text."
        )
    for text, number, count in zip(texts, found, counts):
        if number not in (0, count, count * queries):
            raise ValueError(
                f"The text {text!r} has {_counted(number, f'{token} placeholder')}, but was given {_counted(count, 'image')}. "
                f"Write {token} once for each image, or leave it out: then the images go first. Where it is "
                "a word, pass split_special_tokens=True."
            )
    return counts


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def cuts(options: dict) -> bool:
    """Whether texts are cut, as in transformers: when asked, or by a max_length alone."""
    truncation = options.get("truncation")
    if truncation is None:
        return options.get("max_length") is not None and not options.get("padding")
    if truncation is True or truncation is False:
        return truncation
    if TruncationStrategy(truncation) is TruncationStrategy.ONLY_SECOND:
        raise ValueError("truncation='only_second' is not supported here: a prompt is one text. Pass truncation=True.")
    return TruncationStrategy(truncation) is not TruncationStrategy.DO_NOT_TRUNCATE


def encode_prompts(
    layout: TextLayout, texts: list[str], counts: list[int], special: list[str], options: dict
) -> dict[str, list]:
    """input_ids, attention_mask and what else `options` ask for, each a list of rows; padded if they ask for it.

    Args:
        counts: images of each text, as `images_by_text` gives them.
        special: the special tokens that count in a text; the first is what stands for an image.
        options: arguments of the text, without `NOT_OF_PROMPTS`. max_length counts image tokens too, but only words are ever cut.

    Offsets are those of the text as given; image tokens have (0, 0), and 1 in the special tokens mask.
    """
    tokenizer = layout.words.tokenizer
    padding, multiple = options.get("padding", False), options.get("pad_to_multiple_of")
    max_length, cut = options.get("max_length"), cuts(options)
    longest = tokenizer.model_max_length if max_length is None else max_length
    if cut and padding and multiple and max_length is not None and max_length % multiple:
        raise ValueError(
            f"max_length={max_length} is not a multiple of pad_to_multiple_of={multiple}, so texts that are cut to the one "
            "cannot be padded to the other. Change one of them."
        )
    rows = []
    for text, count in zip(texts, counts):
        row, is_word = _encode(layout, text, count, special, options, warns=not cut)
        rows.append(_cut(row, is_word, longest, tokenizer.truncation_side, count * layout.queries) if cut else row)
    batch = {name: [row[name] for row in rows] for name in rows[0]}
    if padding:
        _pad(tokenizer, batch, padding, None if cut and padding != "max_length" else max_length, multiple, options)
    if options.get("return_attention_mask") is False:
        del batch["attention_mask"]
    if options.get("return_length"):
        batch["length"] = [len(ids) for ids in batch["input_ids"]]
    if options.get("return_mm_token_type_ids"):
        batch["mm_token_type_ids"] = [[int(number == layout.image_id) for number in ids] for ids in batch["input_ids"]]
    if options.get("return_text_replacement_offsets"):
        batch["text_replacement_offsets"] = [[] for _ in rows]  # offsets are of the text as given: none has moved
    return batch


def _encode(
    layout: TextLayout, text: str, images: int, special: list[str], options: dict, warns: bool
) -> tuple[dict[str, list], list[bool]]:
    """One prompt of any length, column by column, and which of its tokens are words."""
    token = special[0] if special else ""
    found = text.count(token) if token else 0
    # Laid out already, or an `<image>` for each image.
    copies = 1 if found == images * layout.queries else layout.queries
    start = re.match(rf"(?:\s*{re.escape(token)})+", text) if found else None
    begin, leading = (start.end(), start.group().count(token) * copies) if start else (0, 0)
    row = _words(layout, text[begin:], special, options, warns)
    before, after = (layout.before, layout.after) if options.get("add_special_tokens", True) else ([], [])
    if row["input_ids"][: len(before)] == before:
        before = []  # a chat template has written it
    enclosed = [*before, *row["input_ids"], *after]
    first, last = len(before), len(before) + len(row["input_ids"])  # where the words are
    source = [None] * (leading if found else images * layout.queries)  # places in `enclosed`; None is an image token
    for place, number in enumerate(enclosed):
        source += [None] * copies if number == layout.image_id else [place]

    def column(name: str, other: object) -> list:
        return [row[name][place - first] if place is not None and first <= place < last else other for place in source]

    is_word = [place is not None and first <= place < last for place in source]
    columns = {
        "input_ids": [layout.image_id if place is None else enclosed[place] for place in source],
        "attention_mask": [1] * len(source),
    }
    if options.get("return_token_type_ids"):
        columns["token_type_ids"] = column("token_type_ids", 0)
    if options.get("return_special_tokens_mask"):
        columns["special_tokens_mask"] = [int(not word) for word in is_word]
    if options.get("return_offsets_mapping"):
        spans = column("offset_mapping", (0, 0))
        columns["offset_mapping"] = [(a + begin, b + begin) if b > a else (0, 0) for a, b in spans]
    return columns, is_word


def _words(layout: TextLayout, text: str, special: list[str], options: dict, warns: bool) -> dict[str, list]:
    """The tokenizer's columns for the words of a prompt, without special tokens around them."""
    asked = {
        "return_token_type_ids": bool(options.get("return_token_type_ids")),
        "return_offsets_mapping": bool(options.get("return_offsets_mapping")),
        "verbose": warns and options.get("verbose", True),
    }
    if options.get("split_special_tokens") is False:
        return layout.words.row_with_all(text, **asked)
    return layout.words.row_with(special, text, **asked)


def _cut(row: dict[str, list], is_word: list[bool], longest: int, side: str, image_tokens: int) -> dict[str, list]:
    """Drop the last words (side "right") or the first, so that at most `longest` tokens are left.

    Image and special tokens stay: without all of an image's tokens its features would have no place.
    """
    excess = len(is_word) - longest
    if excess <= 0:
        return row
    words = [place for place, word in enumerate(is_word) if word]
    if excess > len(words):
        kept = len(is_word) - len(words)
        raise ValueError(
            f"max_length={longest} has no room for the {image_tokens} image tokens and {kept - image_tokens} special tokens. "
            f"Set max_length to at least {kept} plus the length of the text."
        )
    dropped = set(words[:excess] if side == "left" else words[-excess:])
    return {name: [v for place, v in enumerate(values) if place not in dropped] for name, values in row.items()}


def _pad(
    tokenizer: PreTrainedTokenizerBase, batch: dict, padding: object, length: int | None, multiple: int, options: dict
) -> None:
    """Pad the columns of a batch in place."""
    side = options.get("padding_side") or tokenizer.padding_side
    offsets = batch.pop("offset_mapping", None)  # the tokenizer pads only what it knows
    lengths = {"padding": padding, "max_length": length, "pad_to_multiple_of": multiple}
    batch.update(tokenizer.pad(dict(batch), padding_side=side, verbose=options.get("verbose", True), **lengths))
    if offsets is not None:
        missing = [[(0, 0)] * (len(ids) - len(row)) for ids, row in zip(batch["input_ids"], offsets)]
        batch["offset_mapping"] = [pad + row if side == "left" else row + pad for pad, row in zip(missing, offsets)]


def encode_for_qformer(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], counts: list[int], token: str, options: dict
) -> dict[str, list]:
    """qformer_input_ids and qformer_attention_mask, a row for each image: the text it stands in, without `<image>`.

    Cut and padded as the prompt is, but on the right, with its own special tokens, and never to more than its tokenizer's
    model_max_length. max_length counts its own tokens alone.
    """
    plain = [text.replace(token, " ").strip() if token else text for text in texts]
    plain = [text for text, count in zip(plain, counts) for _ in range(count)]
    padding, cut, max_length = options.get("padding", False), cuts(options), options.get("max_length")
    if max_length is not None:
        max_length = min(max_length, tokenizer.model_max_length) if cut or padding == "max_length" else None
    encoded = PlainWords(tokenizer).batch(
        plain,
        padding=padding,
        padding_side="right",
        truncation=cut,
        max_length=max_length,
        pad_to_multiple_of=options.get("pad_to_multiple_of"),
        return_token_type_ids=False,
        return_attention_mask=True,
        verbose=options.get("verbose", True),
    )
    columns = {"qformer_input_ids": encoded["input_ids"], "qformer_attention_mask": encoded["attention_mask"]}
    if options.get("return_attention_mask") is False:
        del columns["qformer_attention_mask"]
    return columns
