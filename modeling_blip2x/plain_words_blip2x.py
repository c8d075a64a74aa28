"""Words are words: the tokens of a text that may spell `</s>`, `<image>` or `[SEP]`, and means these characters.

`split_special_tokens` of transformers does that for most tokenizers. A vocabulary that itself holds special tokens
(Unigram, as T5's) finds them all the same; there a space is put into what the text spells.
"""

import re
import threading
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# Fast tokenizers hold `split_special_tokens` as a state, which threads would change for one another.
ENCODING = threading.Lock()


class PlainWords:
    """A tokenizer's rows and batches of texts in which nothing is special."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special = sorted(token for token in added | set(tokenizer.all_special_tokens) if len(token) > 1)
        # Words may have the id of unknown ones.
        self.special_ids = set(tokenizer.convert_tokens_to_ids(self.special)) - {tokenizer.unk_token_id}

    def row(self, text: str, **options: object) -> dict[str, list]:
        """The tokenizer's columns for a text, without special tokens around it."""
        broken, spaces = self.broken(text)
        # A tokenizer in Python would split the added tokens that are words, too.
        row = self._encode(text, self.tokenizer.is_fast or bool(spaces), options)
        if not spaces or not self.special_ids & set(row["input_ids"]):
            return row
        return _moved_back(self._encode(broken, True, options), spaces)

    def row_with(self, special: list[str], text: str, **options: object) -> dict[str, list]:
        """As `row`, but each of some special tokens, such as the `<image>` of a processor, counts as one."""
        if not any(token in text for token in special):
            return self.row(text, **options)
        broken, spaces = self.broken(text, special)
        return _moved_back(self._encode(broken, False, options), spaces)

    def row_with_all(self, text: str, **options: object) -> dict[str, list]:
        """The columns of a text in which every special token counts."""
        return self._encode(text, False, options)

    def batch(self, texts: list[str], **options: object) -> dict:
        """The tokenizer's batch, with its special tokens around each text."""
        plain, split = [], self.tokenizer.is_fast
        for text in texts:
            broken, spaces = self.broken(text)
            found = spaces and self.special_ids & set(self._encode(text, True, {})["input_ids"])
            plain.append(broken if found else text)
            split = split or bool(spaces)
        with ENCODING:
            return self.tokenizer(plain, **{"split_special_tokens": split, **options})

    def broken(self, text: str, but: Sequence[str] = ()) -> tuple[str, list[int]]:
        """The text with a space in each special token that it spells, but some, and the places of these spaces."""
        spelt = [token for token in self.special if token in text and token not in but]
        if not spelt:
            return text, []
        pieces, spaces, length = [], [], 0
        for piece in re.split("|".join(f"(?={re.escape(token)})" for token in spelt), text):
            if piece.startswith(tuple(spelt)):
                spaces.append(length + 1)
                piece = f"{piece[0]} {piece[1:]}"
            pieces.append(piece)
            length += len(piece)
        return "".join(pieces), spaces

    def _encode(self, text: str, split: bool, options: dict) -> dict[str, list]:
        with ENCODING:
            return dict(self.tokenizer(text, add_special_tokens=False, split_special_tokens=split, **options))


def _moved_back(row: dict[str, list], spaces: list[int]) -> dict[str, list]:
    """Columns whose offsets are those of the text without the spaces that were put in."""
    if spaces and "offset_mapping" in row:
        row["offset_mapping"] = [
            tuple(place - sum(space < place for space in spaces) for place in span) for span in row["offset_mapping"]
        ]
    return row
