"""Stage 1: the Q-Former learns to represent images, with ITC, ITM and ITG and a frozen vision tower (section 3.2).

    accelerate launch training/pretrain_stage1.py --config training/configs/flickr8k_stage1.yaml \
        --dataset DIR --vision_model DIR --output_dir OUT

The same command again continues from the last whole checkpoint. --help lists the fields.
"""

import functools
import sys
from pathlib import Path

from args import Stage1Arguments, parse_arguments
from checkpoint import is_finished, read_state
from collators import Stage1Collator
from data import BatchOrder, make_loader
from inputs import (
    count_steps,
    load_dataset_split,
    load_image_processor,
    open_output_dir,
    output_size,
    read_stage1_config,
    seed_training,
    start_run,
    use_feature_cache,
)
from loop import finish, train
from optim import build_optimizer, learning_rate_at
from transformers import AutoProcessor
from validation import RetrievalSet, matching_accuracy, mean_losses, recall_at_k, rerank
from vocabulary import build_tokenizer, load_qformer_tokenizer

from modeling_blip2x import Blip2xForPreTraining, Blip2xProcessor, Blip2xQFormerConfig


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Stage1Arguments, sys.argv[1:] if argv is None else argv)
    accelerator = start_run(args, unused_parameters=len(args.objectives) < 3)
    output_dir = Path(args.output_dir)

    if args.init_from:
        read_stage1_config(args.init_from)  # before anything slow

    # Data
    image_processor = load_image_processor(args.init_from or args.vision_model, args.image_size)
    size = output_size(image_processor)
    train_set = load_dataset_split(
        args, accelerator, args.train_split, crop_size=size if args.augment else None, draw_text=True
    )
    eval_set = args.eval_split and load_dataset_split(
        args, accelerator, args.eval_split, crop_size=None, draw_text=False
    )
    max_steps = count_steps(args, len(train_set), accelerator.num_processes)
    if is_finished(output_dir, max_steps) and not args.overwrite_output_dir:
        accelerator.print(f"{output_dir} is finished: {max_steps} steps. Pass --overwrite_output_dir to start over.")
        return

    # Model
    if args.init_from:
        model = Blip2xForPreTraining.from_pretrained(args.init_from)
        model.config.objectives = args.objectives
        tokenizer = AutoProcessor.from_pretrained(args.init_from).tokenizer
    else:
        name = args.qformer_tokenizer or args.qformer_init
        tokenizer = (
            load_qformer_tokenizer(name)
            if name
            else build_tokenizer([text for texts in train_set.texts for text in texts], args.min_word_count)
        )
        model = Blip2xForPreTraining.from_unimodal(
            args.vision_model,
            args.qformer_init or qformer_config(args.qformer_config, tokenizer),
            tokenizer=tokenizer,
            num_query_tokens=args.num_query_tokens,
            image_text_hidden_size=args.image_text_hidden_size,
            vision_feature_layer=args.vision_feature_layer,
            objectives=args.objectives,
        )
    processor = Blip2xProcessor(image_processor, tokenizer)
    model.check_processor(processor)
    model.freeze_unimodal()
    accelerator.print(model.trainable_parameters_summary())
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.torch_compile:
        model.compile()
    if args.feature_cache:
        splits = {args.train_split: train_set} | ({args.eval_split: eval_set} if eval_set else {})
        use_feature_cache(args.feature_cache, model, image_processor, splits)

    # Batches, from where an earlier run of this folder stopped
    open_output_dir(args, accelerator)
    state = read_state(output_dir)
    collator = Stage1Collator(image_processor, processor.tokenizer, args.max_text_length, cropped=args.augment)
    order = BatchOrder(
        len(train_set),
        args.per_device_train_batch_size,
        (max_steps - state["step"]) * args.gradient_accumulation_steps,
        seed=args.seed,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        samples_seen=state["samples_seen"],
    )
    on_gpu = accelerator.device.type == "cuda"
    batches = make_loader(train_set, order, collator, args.dataloader_num_workers, pin_memory=on_gpu)
    eval_batch = args.per_device_eval_batch_size or args.per_device_train_batch_size
    eval_collator = Stage1Collator(image_processor, processor.tokenizer, args.max_text_length, cropped=False)

    def negatives(forward: int) -> dict:
        """How a forward draws its negatives: the same whatever the number of processes."""
        step = forward // args.gradient_accumulation_steps
        return {
            "negative_seed": args.seed * 1_000_003 + forward,
            "negative_hardness": hardness_at(step, args.hard_negative_steps),
        }

    def eval_negatives(batch: int) -> dict:
        return {"negative_seed": batch}

    def validate(final: bool = False) -> dict:
        if not eval_set:
            return {}
        order = BatchOrder(
            len(eval_set),
            eval_batch,
            max(1, len(eval_set) // (eval_batch * accelerator.num_processes)),
            seed=0,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        losses = mean_losses(accelerator, model, make_loader(eval_set, order, eval_collator, 0, on_gpu), eval_negatives)
        if accelerator.is_main_process:  # no exchange with other processes from here on
            data = RetrievalSet(model, eval_set, eval_collator, accelerator)
            losses |= recall_at_k(data.cosines, data.owner)
            if "itm" in args.objectives:
                losses |= matching_accuracy(data, eval_batch, model.temperature.item(), args.seed)
                losses |= rerank(data, args.rerank_k, model.temperature.item()) if final and args.rerank_k else {}
        accelerator.wait_for_everyone()
        return losses

    # Training
    optimizer = build_optimizer(
        model,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
    )
    schedule = functools.partial(
        learning_rate_at,
        max_steps=max_steps,
        warmup_steps=args.warmup_steps,
        peak=args.learning_rate,
        floor=args.min_learning_rate,
    )
    seed_training(args.seed, accelerator)
    train(
        accelerator,
        model,
        optimizer,
        batches,
        output_dir=output_dir,
        max_steps=max_steps,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        max_grad_norm=args.max_grad_norm,
        learning_rate=schedule,
        logging_steps=args.logging_steps,
        save_steps=args.save_steps,
        save_total_limit=args.save_total_limit,
        eval_steps=args.eval_steps,
        validate=validate,
        forward_inputs=negatives,
    )

    finish(accelerator, output_dir, max_steps, validate(final=True), model, processor)


def hardness_at(step: int, steps: int) -> float:
    """Exponent on the ITC softmax that negatives are drawn by: from 0 (evenly) to 1 (the paper) over `steps` steps."""
    return min(1.0, step / steps) if steps else 1.0


def qformer_config(fields: dict | None, tokenizer) -> Blip2xQFormerConfig:
    """A Q-Former of the given shape with a vocabulary that fits the tokenizer."""
    return Blip2xQFormerConfig(
        **{
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **(fields or {}),
        }
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
