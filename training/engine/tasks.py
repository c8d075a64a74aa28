"""The two kinds of training as `Task`s: image-text objectives, and language modelling.

Stage 1 and the fine-tuning of retrieval share the first, stage 2 and every other fine-tuning the second.
"""

import torch
from accelerate import Accelerator

from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xForPreTraining, Blip2xProcessor

from ..arguments.finetuning import FinetuneArguments
from ..arguments.pretraining import Stage1Arguments, Stage2Arguments
from ..arguments.training import RunArguments
from ..data.caption_dataset import CaptionDataset, JointDataset
from ..data.collators import Stage1Collator, language_collator
from ..data.token_counts import label_tokens, text_tokens
from ..evaluation.validation import validate_image_text, validate_language
from ..models.loading import agree_on_texts
from .chunked_step import chunked_step
from .train_loop import Task, plain_step


def image_text_task(
    args: Stage1Arguments | FinetuneArguments,
    accelerator: Accelerator,
    model: Blip2xForPreTraining,
    processor: Blip2xProcessor,
    eval_set: CaptionDataset | JointDataset | None,
) -> Task:
    """ITC, ITM and ITG. Rows that show the same image are positives of one another."""
    if args.gradient_accumulation_steps > 1:
        accelerator.print(
            f"Each of the {args.gradient_accumulation_steps} accumulated forwards contrasts its own pairs only: "
            "accumulation adds no negatives to ITC. A larger --per_device_train_batch_size with --itc_chunk_size does, "
            "in the memory of a chunk."
        )

    def collator(cropped: bool) -> Stage1Collator:
        levels = sends_levels(args, cropped)
        return Stage1Collator(processor.image_processor, processor.tokenizer, args.max_text_length, cropped, levels)

    def negatives(forward: int) -> dict:
        """How a forward draws its negatives: the same whatever the number of processes."""
        step = forward // args.gradient_accumulation_steps
        return {
            "negative_seed": args.seed * 1_000_003 + forward,
            "negative_hardness": hardness_at(step, args.hard_negative_steps),
        }

    def validate(final: bool) -> dict:
        rerank_k = args.rerank_k if final else 0
        return validate_image_text(
            accelerator,
            model,
            eval_set,
            collator(cropped=False),
            args.eval_batch_size,
            rerank_k,
            args.eval_samples,
            args.seed,
        )

    step = chunked_step(args.itc_chunk_size) if args.itc_chunk_size else plain_step
    return Task(collator(cropped=args.augment), text_tokens, validate, negatives, step)


def sends_levels(args: RunArguments, cropped: bool) -> bool:
    """Whether pixels come as levels: from workers, through shared memory that is small in containers."""
    return cropped and args.dataloader_num_workers > 0


def hardness_at(step: int, steps: int) -> float:
    """Exponent on the ITC softmax that negatives are drawn by: from 0 (evenly) to 1 (the paper) over `steps` steps."""
    return min(1.0, step / steps) if steps else 1.0


def language_task(
    args: Stage2Arguments | FinetuneArguments,
    accelerator: Accelerator,
    model: Blip2xForConditionalGeneration,
    processor: Blip2xProcessor,
    eval_set: CaptionDataset | JointDataset | None,
) -> Task:
    """The language model's loss on the text, given image and prompt. The prompt's template stays in the checkpoint."""
    model.config.prompt_template = prompt_template(args, model.config.is_encoder_decoder)
    agree_on_texts(model, processor)
    spelt = [token for token in processor.text_layout.words.special if token in (args.prompt or "")]
    if spelt:
        accelerator.print(
            f"--prompt spells {', '.join(spelt)}: these are words, as in every text and every prompt later."
        )
    if processor.qformer_tokenizer is None:
        freeze_text_branch(model)

    def validate(final: bool) -> dict:
        collator = language_collator(model, processor, args.max_text_length, cropped=False)
        return validate_language(
            accelerator, model, processor, eval_set, collator, args.eval_batch_size, args.eval_samples
        )

    def count_tokens(batch: dict) -> torch.Tensor:
        return label_tokens(batch, model.config.is_encoder_decoder)

    levels = sends_levels(args, args.augment)
    collator = language_collator(model, processor, args.max_text_length, args.augment, levels)
    return Task(collator, count_tokens, validate)


def prompt_template(args: Stage2Arguments | FinetuneArguments, is_encoder_decoder: bool) -> str | None:
    """The prompt that evaluation asks this model with by default: the one that it is trained with.

    "" is a prompt too, the image alone. An encoder-decoder without a prompt reads the beginning of each text instead
    (prefix language modelling), never the image alone, so there is none to record: None leaves the choice to evaluation.
    """
    if args.prompt:
        return args.prompt
    if args.prompt_column:
        return "{}"
    return None if is_encoder_decoder else ""


def freeze_text_branch(model: Blip2xForConditionalGeneration) -> None:
    """A text branch that came with BERT gets no gradient where the queries read no text."""
    for name, parameter in model.model.qformer.named_parameters():
        if name.startswith("embeddings") or "text_feed_forward" in name:
            parameter.requires_grad_(False)
