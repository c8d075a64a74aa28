"""Stage 2: the projected queries become a soft prompt of a frozen LLM (section 3.3).

    accelerate launch training/pretrain_stage2.py --config training/configs/flickr8k_stage2.yaml \
        --dataset DIR --init_from STAGE1 --language_model DIR --output_dir OUT

The same command again continues from the last whole checkpoint. --help lists the fields.
"""

import functools
import sys
from pathlib import Path

from args import Stage2Arguments, parse_arguments
from checkpoint import is_finished, read_state
from collators import CausalLMCollator, Seq2SeqLMCollator
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
from lora import LoraCheckpoint, add_lora
from optim import build_optimizer, learning_rate_at
from transformers import AutoTokenizer
from validation import token_accuracy

from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xProcessor, Blip2xQFormerConfig


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Stage2Arguments, sys.argv[1:] if argv is None else argv)
    accelerator = start_run(args)
    output_dir = Path(args.output_dir)

    # Data
    image_processor = load_image_processor(args.init_from or args.vision_model, args.image_size)
    size = output_size(image_processor)
    read = functools.partial(
        load_dataset_split, args, accelerator, prompt=args.prompt, prompt_column=args.prompt_column
    )
    train_set = read(args.train_split, crop_size=size if args.augment else None, draw_text=True)
    eval_set = args.eval_split and read(args.eval_split, crop_size=None, draw_text=False)
    max_steps = count_steps(args, len(train_set), accelerator.num_processes)
    if is_finished(output_dir, max_steps) and not args.overwrite_output_dir:
        accelerator.print(f"{output_dir} is finished: {max_steps} steps. Pass --overwrite_output_dir to start over.")
        return

    # Model
    tokenizer = AutoTokenizer.from_pretrained(args.language_model)
    if args.init_from:
        num_query_tokens = read_stage1_config(args.init_from).num_query_tokens
        processor = Blip2xProcessor(image_processor, tokenizer, num_query_tokens=num_query_tokens)
        model = Blip2xForConditionalGeneration.from_stage1(
            args.init_from, args.language_model, image_token_index=processor.image_token_id
        )
    else:
        processor = Blip2xProcessor(image_processor, tokenizer, num_query_tokens=args.num_query_tokens)
        qformer = args.qformer_init or Blip2xQFormerConfig(
            **{"use_qformer_text_input": False, **(args.qformer_config or {})}
        )
        model = Blip2xForConditionalGeneration.from_unimodal(
            args.vision_model,
            args.language_model,
            qformer,
            num_query_tokens=args.num_query_tokens,
            image_token_index=processor.image_token_id,
            vision_feature_layer=args.vision_feature_layer,
        )
    model.check_processor(processor)
    model.freeze_unimodal()
    for name, parameter in model.model.qformer.named_parameters():
        if name.startswith("embeddings") or "text_feed_forward" in name:
            parameter.requires_grad_(False)  # a text branch that came with BERT: the queries read no text here
    if args.lora:
        add_lora(model, args.lora)
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
    kind = Seq2SeqLMCollator if model.config.is_encoder_decoder else CausalLMCollator
    collate = functools.partial(
        kind,
        image_processor,
        processor.tokenizer,
        model.config.num_query_tokens,
        processor.image_token_id,
        args.max_text_length,
    )
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
    batches = make_loader(
        train_set, order, collate(cropped=args.augment), args.dataloader_num_workers, pin_memory=on_gpu
    )
    eval_batch = args.per_device_eval_batch_size or args.per_device_train_batch_size

    def validate() -> dict:
        if not eval_set:
            return {}
        rows = range(accelerator.process_index, len(eval_set), accelerator.num_processes)
        order = [[(0, row) for row in rows[start : start + eval_batch]] for start in range(0, len(rows), eval_batch)]
        return token_accuracy(accelerator, model, make_loader(eval_set, order, collate(cropped=False), 0, on_gpu))

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
    )

    checkpoint = LoraCheckpoint(model, processor if args.merge_lora else None) if args.lora else model
    finish(accelerator, output_dir, max_steps, validate(), checkpoint, processor)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
