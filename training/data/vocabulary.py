"""The Q-Former's tokenizer: a BERT one from the hub or a folder, or one built from the training captions."""

from collections import Counter

from tokenizers import Tokenizer, decoders
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]


def load_qformer_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A BERT tokenizer with [DEC], the token that starts generation, as its bos token."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    for token in ("cls_token", "sep_token", "pad_token"):
        if getattr(tokenizer, token, None) is None:
            raise ValueError(
                f"--qformer_tokenizer {name} has no {token}. The Q-Former reads [CLS] text [SEP]: use a BERT tokenizer."
            )
    if tokenizer.bos_token is None:
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def build_tokenizer(texts: list[str], min_count: int) -> PreTrainedTokenizerFast:
    """A BERT-style tokenizer with the words that occur at least `min_count` times in `texts`.

    Rarer words are spelt in characters, so a training text never gives [UNK].
    """
    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    characters = sorted({character for word in counts for character in word})
    words = sorted(word for word, count in counts.items() if count >= min_count and len(word) > 1)
    pieces = [*SPECIAL, *characters, *[f"##{character}" for character in characters], *words]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}

    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoders.WordPiece()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="[DEC]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
    )
