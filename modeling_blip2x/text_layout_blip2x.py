"""Where a language model's texts begin and end: one layout for training, validation, evaluation, processor and Space.

    decoder-only       image tokens, before, prompt,         text, end
    encoder-decoder    image tokens, before, prompt, after             what the encoder reads
                                             opening,        text, end what the decoder writes

`before`, `after` and `opening` are what the tokenizer puts around a text, found by asking it: `</s> text` of OPT and XGLM,
`<s> text </s>` of BART, `text </s>` of T5, `[CLS] text [SEP]` of BERT, language codes of mBART. A decoder-only model goes
on after its prompt, which has therefore not ended: what its tokenizer appends (Llama with add_eos_token) is left out there.
"""

from transformers import PreTrainedTokenizerBase

from .plain_words_blip2x import ENCODING, PlainWords

PROBES = ("a", "the", "0", ".", "\u3042")  # any tokenizer has a token for one of them


class TextLayout:
    """The ids around the words of a tokenizer's texts, and the words themselves.

    Args:
        image_id: id of an image token; queries: how many of them an image takes.
        is_encoder_decoder: of the language model. None, where it is not known: a prompt ends as the tokenizer ends a text,
            unless that is told to append its end token.

    Attributes:
        before, after: ids around a prompt's words. opening: ids that what is written begins with.
        start: id that the decoder begins from, where the tokenizer tells it (mBART), else None.
        end: id that ends what is written; None where the tokenizer names none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_id: int,
        queries: int,
        is_encoder_decoder: bool | None = None,
    ):
        self.image_id, self.queries = image_id, queries
        self.words = PlainWords(tokenizer)
        # BERT's tokenizers name a separator alone.
        self.end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self.before, self.after = around(tokenizer)
        ends = not getattr(tokenizer, "add_eos_token", False) if is_encoder_decoder is None else is_encoder_decoder
        if not ends:
            self.after = []
        self.opening, self.start = [], None
        if is_encoder_decoder:
            self.opening, closing = around(tokenizer, target=True)
            if closing and closing[-1] != self.end:
                self.start = closing[-1]  # mBART writes `text </s> en_XX`, and starts its decoder from the code

    def prompt(self, text: str) -> list[int]:
        """Ids of an image and a prompt in which nothing is special: what `generate` goes on from."""
        return self.enclosed(self.ids(text))

    def enclosed(self, words: list[int]) -> list[int]:
        """Ids of an image and of a prompt that has these words."""
        return [self.image_id] * self.queries + [*self.before, *words, *self.after]

    def ids(self, text: str) -> list[int]:
        """Ids of the words of a text."""
        return self.words.row(text)["input_ids"]

    def continuation(self, prompt: str, text: str) -> list[int]:
        """Ids of the words of a text that a decoder-only model writes after a prompt, a space between them."""
        if not prompt:
            return self.ids(text)
        asked, whole = self.ids(prompt), self.ids(f"{prompt} {text}")
        if whole[: len(asked)] == asked:
            return whole[len(asked) :]
        # The tokenizer joins the prompt's end with the text's start; in use the model goes on after the prompt's own ids.
        return self.ids(f" {text}")

    def closed(self, words: list[int], longest: int) -> list[int]:
        """Ids and the end, or the first `longest` ids: a text that was cut does not end there."""
        return [*words, self.end] if len(words) < longest else words[:longest]


def around(tokenizer: PreTrainedTokenizerBase, target: bool = False) -> tuple[list[int], list[int]]:
    """Ids that a tokenizer puts before and after the words of a text, or (target) of one that is to be written.

    Raises ValueError for a tokenizer that puts them elsewhere.
    """
    # A tokenizer of many languages to which none is named to write in writes as it reads.
    target = target and getattr(tokenizer, "tgt_lang", "") is not None
    for probe in PROBES:
        with ENCODING:
            words = tokenizer(probe, add_special_tokens=False)["input_ids"]
            whole = tokenizer(**{"text_target" if target else "text": probe})["input_ids"]
        for place in range(len(whole) - len(words) + 1) if words else ():
            if whole[place : place + len(words)] == words:
                return whole[:place], whole[place + len(words) :]
    raise ValueError(
        f"{type(tokenizer).__name__} gives {whole} for {probe!r}, and {words} without special tokens: where a text begins "
        "and ends cannot be told. Use a tokenizer that puts its special tokens around the words."
    )
