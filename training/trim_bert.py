"""Cut a BERT checkpoint to the word pieces that the training captions use, and to its first layers.

    python training/trim_bert.py --bert DIR_OR_ID --dataset DIR --text_column captions --num_layers 3 --output_dir BERT
    python training/pretrain_stage1.py ... --qformer_init BERT

On a CPU the output layer of ITG over 30 522 pieces costs as much as the rest of the Q-Former; a caption data set uses
a few thousand. Training texts are split as before; the pieces come from the training split alone.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from blip2x_training.arguments.base import BIG, TINY, Arguments, doc
from blip2x_training.arguments.parsing import parse_arguments
from blip2x_training.data.caption_dataset import read_captions
from blip2x_training.data.formats import load_rows
from blip2x_training.system.atomic_files import even_modes
from blip2x_training.system.commands import run_command
from modeling_blip2x.plain_words_blip2x import PlainWords


@dataclass
class TrimArguments(Arguments):
    """A smaller BERT for the Q-Former."""

    bert: str | None = doc(None, "Id or folder of a BERT checkpoint with a fast tokenizer. Required.")
    dataset: str | None = doc(None, "As in training. Required.")
    dataset_config: str | None = doc(None, "Its configuration, where the data set has several.")
    output_dir: str | None = doc(None, "Folder of the smaller BERT. Required.")
    train_split: str = doc("train", "As in training.")
    text_column: str | None = doc(None, "As in training.")
    clean_captions: bool = doc(True, "As in training.")
    num_layers: int | None = doc(None, "Layers to keep, from the first; null keeps all.")
    dropout: float | None = doc(
        None, "Dropout of the Q-Former; null keeps BERT's 0.1. A short run does better without."
    )
    initializer_range: float | None = doc(
        None, "Spread of the Q-Former's new parts; null keeps BERT's 0.02, which suits 768. About .65 / sqrt(width)."
    )

    REQUIRED = ("bert", "dataset", "output_dir")
    PATHS = ("bert",)
    RANGES = {"num_layers": (1, BIG), "dropout": (0, 1), "initializer_range": (TINY, BIG)}


def used_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[int]:
    """Ids that `texts` use, special tokens, and single characters for words of other texts; ascending."""
    encoded = PlainWords(tokenizer).batch(texts)["input_ids"]
    used = {token for ids in encoded for token in ids} | set(tokenizer.all_special_ids)
    used |= {
        token
        for piece, token in tokenizer.get_vocab().items()
        if len(piece.removeprefix("##")) == 1 and piece.isascii()
    }
    return sorted(used)


def trimmed_tokenizer(tokenizer: PreTrainedTokenizerFast, kept: list[int]) -> PreTrainedTokenizerFast:
    """The same tokenizer with only the pieces `kept`, renumbered in order."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    new_id = {old: new for new, old in enumerate(kept)}
    vocabulary = description["model"]["vocab"]
    description["model"]["vocab"] = {piece: new_id[old] for piece, old in vocabulary.items() if old in new_id}
    for token in description["added_tokens"]:
        token["id"] = new_id[token["id"]]
    for token in (description["post_processor"] or {}).get("special_tokens", {}).values():
        token["ids"] = [new_id[old] for old in token["ids"]]
    description["truncation"] = description["padding"] = None
    special = {
        name: getattr(tokenizer, name) for name in ("unk_token", "cls_token", "sep_token", "pad_token", "mask_token")
    }
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)), **special)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(TrimArguments, sys.argv[1:] if argv is None else argv)
    rows = load_rows(args.dataset, args.train_split, config=args.dataset_config)
    texts = read_captions(rows, args.text_column, args.clean_captions)
    tokenizer = AutoTokenizer.from_pretrained(args.bert)
    model = AutoModel.from_pretrained(args.bert)
    if 2 * len(tokenizer) < model.config.vocab_size:
        raise ValueError(
            f"The tokenizer of {args.bert} has only {len(tokenizer)} pieces for a vocabulary of "
            f"{model.config.vocab_size}: its files are not those of a fast tokenizer. The folder needs tokenizer.json."
        )
    kept = used_ids(tokenizer, texts)
    smaller = trimmed_tokenizer(tokenizer, kept)

    embedding = model.get_input_embeddings()
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(embedding.weight.detach()[kept], freeze=False))
    model.config.vocab_size, model.config.pad_token_id = len(kept), smaller.pad_token_id
    if args.num_layers:
        del model.encoder.layer[args.num_layers :]
        model.config.num_hidden_layers = len(model.encoder.layer)
    if args.dropout is not None:
        model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = args.dropout
    if args.initializer_range is not None:
        model.config.initializer_range = args.initializer_range
    model.save_pretrained(args.output_dir)
    smaller.save_pretrained(args.output_dir)
    even_modes(Path(args.output_dir))
    before, after = tokenizer(texts[0])["input_ids"], smaller(texts[0])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(before) == smaller.convert_ids_to_tokens(after)
    print(f"{Path(args.output_dir)}: {len(kept)} of {len(tokenizer)} pieces, {model.config.num_hidden_layers} layers")


if __name__ == "__main__":
    run_command(main)
