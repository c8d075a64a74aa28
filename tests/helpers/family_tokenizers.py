"""Tokenizers as families of language models have them, over letters: what they put around a text is the families' own."""

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BartTokenizer,
    BertTokenizer,
    ByT5Tokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    T5Tokenizer,
    XGLMTokenizer,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MARKS = "<>/[]|_.,:?!-ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def byte_level(*special: str) -> dict:
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return {"vocab": {token: number for number, token in enumerate(tokens)}, "merges": []}


def letters(*special: str) -> dict:
    return {"vocab": {token: number for number, token in enumerate([*special, "▁", *LETTERS, *MARKS])}, "merges": []}


def unigram(*special: str) -> dict:
    """As converted from sentencepiece: the special tokens are pieces of the vocabulary."""
    pieces = ["▁", *LETTERS, *MARKS, "▁a", "▁dog", "▁photo"]
    return {"vocab": [(token, 0.0) for token in special] + [(piece, -3.0) for piece in pieces]}


def biogpt() -> PreTrainedTokenizerFast:
    """`</s> text`, as BioGPT, whose own tokenizer needs another package."""
    tokenizer = Tokenizer(models.BPE(**byte_level("<s>", "<pad>", "</s>", "<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def opt() -> GPT2Tokenizer:
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    return GPT2Tokenizer(**byte_level("<s>", "<pad>", "</s>"), **names, add_bos_token=True)


def bert() -> BertTokenizer:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *MARKS, *[f"##{letter}" for letter in LETTERS]]
    return BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)})


def llama(**options: bool) -> LlamaTokenizer:
    return LlamaTokenizer(**letters("<unk>", "<s>", "</s>"), add_bos_token=True, **options)


def twice_the_same() -> GPT2Tokenizer:
    """GPT-2's told to put its one special token on both ends."""
    return GPT2Tokenizer(**byte_level("<|endoftext|>"), add_bos_token=True, add_eos_token=True)


@dataclass(frozen=True)
class Family:
    """tokenizer: makes one. prompt, written: what is around the words of a prompt, and of what is written after it."""

    tokenizer: object
    prompt: str
    written: str
    start: str | None = None
    is_encoder_decoder: bool = False

    def make(self) -> PreTrainedTokenizerBase:
        return self.tokenizer()


SPM = ("<s>", "<pad>", "</s>", "<unk>")
FAMILIES = {
    "gpt2": Family(lambda: GPT2Tokenizer(**byte_level("<|endoftext|>")), "{}", "{} <|endoftext|>"),
    "gpt2 with both ends": Family(twice_the_same, "<|endoftext|> {}", "{} <|endoftext|>"),
    "opt": Family(opt, "</s> {}", "{} </s>"),
    "qwen": Family(lambda: Qwen2Tokenizer(**byte_level("<|endoftext|>", "<|im_end|>")), "{}", "{} <|endoftext|>"),
    "llama": Family(llama, "<s> {}", "{} </s>"),
    "llama with add_eos_token": Family(lambda: llama(add_eos_token=True), "<s> {}", "{} </s>"),
    "gemma": Family(
        lambda: GemmaTokenizer(**letters("<pad>", "<eos>", "<bos>", "<unk>"), add_bos_token=True), "<bos> {}", "{} <eos>"
    ),
    "xglm": Family(lambda: XGLMTokenizer(**unigram(*SPM)), "</s> {}", "{} </s>"),
    "biogpt": Family(biogpt, "</s> {}", "{} </s>"),
    "bert": Family(bert, "[CLS] {}", "{} [SEP]"),
    "t5": Family(
        lambda: T5Tokenizer(**unigram("<pad>", "</s>", "<unk>"), extra_ids=2), "{} </s>", "{} </s>", None, True
    ),
    "byt5": Family(ByT5Tokenizer, "{} </s>", "{} </s>", None, True),  # written in Python
    "bart": Family(
        lambda: BartTokenizer(**byte_level(*SPM, "<mask>")), "<s> {} </s>", "<s> {} </s>", None, True
    ),
    "bart with bert's": Family(bert, "[CLS] {} [SEP]", "[CLS] {} [SEP]", None, True),
    "mbart": Family(
        lambda: MBartTokenizer(**unigram(*SPM), src_lang="en_XX"), "{} </s> en_XX", "{} </s>", "en_XX", True
    ),
    "mbart to another language": Family(
        lambda: MBartTokenizer(**unigram(*SPM), src_lang="en_XX", tgt_lang="ro_RO"),
        "{} </s> en_XX", "{} </s>", "ro_RO", True,
    ),
    "mbart50": Family(
        lambda: MBart50Tokenizer(**unigram(*SPM), src_lang="en_XX", tgt_lang="ro_RO"),
        "en_XX {} </s>", "ro_RO {} </s>", None, True,
    ),
    "nllb": Family(
        lambda: NllbTokenizer(**letters(*SPM), src_lang="eng_Latn", tgt_lang="fra_Latn"),
        "eng_Latn {} </s>", "fra_Latn {} </s>", None, True,
    ),
}  # fmt: skip
