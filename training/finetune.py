"""Fine-tuning on one task: caption, vqa, instruct (stage-2 models) or retrieval (stage-1 models); section 4.

    accelerate launch training/finetune.py --config training/configs/paper/finetune_vqa.yaml --task vqa \
        --dataset DIR --init_from STAGE2 --output_dir OUT

The language model stays frozen (`--lora lm` adds an adapter), the Q-Former trains, and with `--train_vision true` the
vision tower too. A stage-1 folder and `--language_model` may stand in for a stage-2 folder. The same command again
continues from the last whole checkpoint. --help lists the fields.
"""

import sys

from accelerate import Accelerator
from transformers import AutoConfig, AutoProcessor

from blip2x_training.arguments.finetuning import FinetuneArguments
from blip2x_training.arguments.parsing import parse_arguments
from blip2x_training.data.image_processor import load_image_processor
from blip2x_training.data.splits import load_splits
from blip2x_training.engine.fit import already_finished, fit
from blip2x_training.engine.start import start_run
from blip2x_training.engine.tasks import image_text_task, language_task
from blip2x_training.models.loading import load_language_tokenizer
from blip2x_training.models.quantize import four_bits, load_language_model_in_4bit, mark_as_quantized
from blip2x_training.system.commands import run_command
from blip2x_training.system.processes import folder_of_run
from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xForPreTraining, Blip2xProcessor
from modeling_blip2x.configuration_blip2x import OBJECTIVES


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(FinetuneArguments, sys.argv[1:] if argv is None else argv)
    # As in stage 1: DDP has to know that the heads of objectives left out get no gradient.
    accelerator = start_run(
        args, unused_parameters=args.task == "retrieval" and set(args.objectives) != set(OBJECTIVES)
    )
    with folder_of_run(args.output_dir, accelerator):
        run(args, accelerator)


def run(args: FinetuneArguments, accelerator: Accelerator) -> None:
    """Data, model and processor by the fields, and the training of them."""
    image_processor = load_image_processor(args.init_from, args.image_size)
    train_set, eval_set = load_splits(args, accelerator, image_processor, args.prompt)
    # Asked before the model is built, so that repeating a finished command costs seconds.
    if already_finished(args, accelerator, train_set, eval_set):
        return
    tune = tune_retrieval if args.task == "retrieval" else tune_language
    tune(args, accelerator, image_processor, train_set, eval_set)


def tune_retrieval(args, accelerator, image_processor, train_set, eval_set) -> None:
    """The objectives of stage 1 (section 4.4)."""
    if AutoConfig.from_pretrained(args.init_from).text_config is not None:
        raise ValueError(f"--init_from {args.init_from} holds a stage-2 model. Retrieval tunes a stage-1 model.")
    model = Blip2xForPreTraining.from_pretrained(args.init_from)
    model.config.objectives = args.objectives
    processor = Blip2xProcessor(image_processor, AutoProcessor.from_pretrained(args.init_from).tokenizer)
    choose_trained_parts(model, args.train_vision)
    task = image_text_task(args, accelerator, model, processor, eval_set)
    fit(args, accelerator, model, processor, train_set, eval_set, task)


def tune_language(args, accelerator, image_processor, train_set, eval_set) -> None:
    """The language model's loss on caption, answer or output, given image and prompt (sections 4.2 and 4.3)."""
    model, processor = load_language_side(args, image_processor)
    choose_trained_parts(model, args.train_vision)
    task = language_task(args, accelerator, model, processor, eval_set)
    fit(args, accelerator, model, processor, train_set, eval_set, task)


def load_language_side(args, image_processor) -> tuple[Blip2xForConditionalGeneration, Blip2xProcessor]:
    """A stage-2 folder, or a stage-1 folder with a language model, and the processor that fits."""
    config = AutoConfig.from_pretrained(args.init_from)
    saved = AutoProcessor.from_pretrained(args.init_from)
    if config.text_config is None:
        if args.language_model is None:
            raise ValueError(
                f"--init_from {args.init_from} holds a stage-1 model. Pass --language_model, or a stage-2 folder."
            )
        reader = saved.tokenizer if args.qformer_text_input else None
        language_model = args.language_model
        if args.load_in_4bit:
            language_model = load_language_model_in_4bit(args.language_model, args.bf16)
        tokenizer = load_language_tokenizer(args.language_model, args.end_token)
        processor = Blip2xProcessor(image_processor, tokenizer, reader, config.num_query_tokens)
        model = Blip2xForConditionalGeneration.from_stage1(
            args.init_from,
            language_model,
            image_token_index=processor.image_token_id,
            use_qformer_text_input=args.qformer_text_input,
        )
        if args.load_in_4bit:
            mark_as_quantized(model)
        return model, processor
    if args.language_model is not None:
        raise ValueError(
            f"--language_model is {args.language_model}, but --init_from {args.init_from} has one. Drop it."
        )
    reader = saved.qformer_tokenizer
    if args.qformer_text_input and reader is None:
        raise ValueError(
            f"--qformer_text_input is true, but the Q-Former of --init_from {args.init_from} reads no text. Train stage 2 "
            "with --qformer_text_input true, or start from the stage-1 folder and --language_model."
        )
    if reader is not None and not args.qformer_text_input:
        raise ValueError(
            f"The Q-Former of --init_from {args.init_from} reads the prompt. Pass --qformer_text_input true."
        )
    quantization = {"quantization_config": four_bits(args.bf16)} if args.load_in_4bit else {}
    model = Blip2xForConditionalGeneration.from_pretrained(args.init_from, **quantization)
    return model, Blip2xProcessor(
        image_processor, saved.tokenizer, reader, config.num_query_tokens, chat_template=saved.chat_template
    )


def choose_trained_parts(model, train_vision: bool) -> None:
    model.freeze_unimodal()
    if train_vision:
        model.unfreeze_vision()


def command() -> None:
    """main, with a mistake told in one line: the installed command."""
    run_command(main)


if __name__ == "__main__":
    command()
