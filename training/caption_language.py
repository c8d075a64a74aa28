"""A small language model pre-trained on the captions of a data set, text alone: a frozen LLM for stage 2 on a CPU.

    python training/caption_language.py --dataset DIR --text_column captions --output_dir LM
    python training/pretrain_stage2.py ... --language_model LM

It reads the training split's texts only and no picture. What it knows of the world is how captions go, so that stage 2
has to say what the picture adds.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from blip2x_training.arguments.base import BIG, Arguments, doc
from blip2x_training.arguments.parsing import parse_arguments
from blip2x_training.data.caption_dataset import read_captions
from blip2x_training.data.formats import load_rows
from blip2x_training.system.atomic_files import even_modes
from blip2x_training.system.commands import run_command
from blip2x_training.system.run_lock import locked_folder
from modeling_blip2x.plain_words_blip2x import PlainWords


@dataclass
class LanguageArguments(Arguments):
    """A small Llama on the texts of a data set."""

    dataset: str | None = doc(None, "As in training. Required.")
    dataset_config: str | None = doc(None, "Its configuration, where the data set has several.")
    output_dir: str | None = doc(None, "Folder of the language model. Required.")
    train_split: str = doc("train", "Split whose texts are read.")
    eval_split: str | None = doc(None, "Split whose perplexity is printed; null for none.")
    text_column: str | None = doc(None, "As in training.")
    vocab_size: int = doc(3000, "Byte-level BPE pieces, learnt from the same texts.")
    hidden_size: int = doc(192, "Width.")
    num_hidden_layers: int = doc(3, "Layers.")
    num_train_epochs: float = doc(6.0, "Passes over the texts.")
    per_device_train_batch_size: int = doc(64, "Texts of a step.")
    learning_rate: float = doc(2e-3, "Peak learning rate; cosine to 0.")
    seed: int = doc(0, "Fixes initialisation and order.")

    REQUIRED = ("dataset", "output_dir")
    RANGES = {
        name: (1, BIG) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "per_device_train_batch_size")
    }


def build_bpe(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts <s> before a text; </s> ends one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(LanguageArguments, sys.argv[1:] if argv is None else argv)
    with locked_folder(args.output_dir):
        run(args)


def run(args: LanguageArguments) -> None:
    """Train and write the model and its tokenizer."""
    set_seed(args.seed)

    def read(split: str) -> list[str]:
        return read_captions(load_rows(args.dataset, split, config=args.dataset_config), args.text_column, clean=True)

    texts = read(args.train_split)
    tokenizer = build_bpe(texts, args.vocab_size)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=3 * args.hidden_size,
            num_hidden_layers=args.num_hidden_layers,
            num_attention_heads=max(1, args.hidden_size // 48),
            max_position_embeddings=256,
            initializer_range=0.65 / args.hidden_size**0.5,  # transformers' 0.02 suits a width near 1000
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )

    def encode(captions: list[str]) -> list[dict]:
        return [{"input_ids": [*ids, 2]} for ids in PlainWords(tokenizer).batch(captions)["input_ids"]]

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=args.output_dir,
            num_train_epochs=args.num_train_epochs,
            per_device_train_batch_size=args.per_device_train_batch_size,
            per_device_eval_batch_size=args.per_device_train_batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            weight_decay=0.05,
            save_strategy="no",
            logging_steps=100,
            report_to="none",
            seed=args.seed,
        ),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=encode(texts),
        eval_dataset=encode(read(args.eval_split)) if args.eval_split else None,
    )
    trainer.train()
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise FloatingPointError(
            f"The weights are not finite after training with --learning_rate {args.learning_rate}; nothing is saved. Lower it."
        )
    if args.eval_split:
        loss = trainer.evaluate()["eval_loss"]
        print(f"{args.eval_split}: loss {loss:.3f} a token, perplexity {torch.tensor(loss).exp():.1f}")
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    even_modes(Path(args.output_dir))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{Path(args.output_dir)}: {parameters / 1e6:.1f} million parameters, {len(tokenizer)} pieces.")


if __name__ == "__main__":
    run_command(main)
