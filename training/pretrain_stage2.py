"""Stage 2: the projected queries become a soft prompt of a frozen LLM (section 3.3).

    accelerate launch training/pretrain_stage2.py --config training/configs/flickr8k_stage2.yaml \
        --dataset DIR --init_from STAGE1 --language_model DIR --output_dir OUT

The same command again continues from the last whole checkpoint. --help lists the fields.
"""

import sys

from accelerate import Accelerator
from transformers import AutoProcessor, PreTrainedTokenizerBase

from blip2x_training.arguments.parsing import parse_arguments
from blip2x_training.arguments.pretraining import Stage2Arguments
from blip2x_training.data.image_processor import load_image_processor
from blip2x_training.data.splits import load_splits
from blip2x_training.engine.fit import already_finished, fit
from blip2x_training.engine.start import start_run
from blip2x_training.engine.tasks import language_task
from blip2x_training.models.loading import load_language_tokenizer, read_stage1_config
from blip2x_training.models.quantize import load_language_model_in_4bit, mark_as_quantized
from blip2x_training.system.commands import run_command
from blip2x_training.system.processes import folder_of_run
from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xProcessor, Blip2xQFormerConfig


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Stage2Arguments, sys.argv[1:] if argv is None else argv)
    accelerator = start_run(args)
    with folder_of_run(args.output_dir, accelerator):
        run(args, accelerator)


def run(args: Stage2Arguments, accelerator: Accelerator) -> None:
    """Data, model and processor by the fields, and the training of them."""
    tokenizer = load_language_tokenizer(args.language_model, args.end_token)  # before anything slow
    image_processor = load_image_processor(args.init_from or args.vision_model, args.image_size)
    train_set, eval_set = load_splits(args, accelerator, image_processor, args.prompt)
    # Asked before the model is built, so that repeating a finished command costs seconds.
    if already_finished(args, accelerator, train_set, eval_set):
        return

    model, processor = build_model(args, image_processor, tokenizer)
    if args.load_in_4bit:
        mark_as_quantized(model)
    model.freeze_unimodal()
    task = language_task(args, accelerator, model, processor, eval_set)
    fit(args, accelerator, model, processor, train_set, eval_set, task)


def build_model(
    args: Stage2Arguments, image_processor, tokenizer: PreTrainedTokenizerBase
) -> tuple[Blip2xForConditionalGeneration, Blip2xProcessor]:
    """From a stage-1 folder, or around a tower without stage 1; with the processor that fits."""
    language_model = args.language_model
    if args.load_in_4bit:
        language_model = load_language_model_in_4bit(args.language_model, args.bf16)
    if args.init_from:
        num_query_tokens = read_stage1_config(args.init_from).num_query_tokens
        reader = AutoProcessor.from_pretrained(args.init_from).tokenizer if args.qformer_text_input else None
        processor = Blip2xProcessor(image_processor, tokenizer, reader, num_query_tokens)
        model = Blip2xForConditionalGeneration.from_stage1(
            args.init_from,
            language_model,
            image_token_index=processor.image_token_id,
            use_qformer_text_input=args.qformer_text_input,
        )
        return model, processor
    processor = Blip2xProcessor(image_processor, tokenizer, num_query_tokens=args.num_query_tokens)
    qformer = args.qformer_init or Blip2xQFormerConfig(
        **{"use_qformer_text_input": False, **(args.qformer_config or {})}
    )
    model = Blip2xForConditionalGeneration.from_unimodal(
        args.vision_model,
        language_model,
        qformer,
        num_query_tokens=args.num_query_tokens,
        image_token_index=processor.image_token_id,
        vision_feature_layer=args.vision_feature_layer,
    )
    return model, processor


def command() -> None:
    """main, with a mistake told in one line: the installed command."""
    run_command(main)


if __name__ == "__main__":
    command()
