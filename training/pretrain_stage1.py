"""Stage 1: the Q-Former learns to represent images, with ITC, ITM and ITG and a frozen vision tower (section 3.2).

    accelerate launch training/pretrain_stage1.py --config training/configs/flickr8k_stage1.yaml \
        --dataset DIR --vision_model DIR --output_dir OUT

The same command again continues from the last whole checkpoint. --help lists the fields.
"""

import sys

from accelerate import Accelerator
from transformers import AutoProcessor

from blip2x_training.arguments.parsing import parse_arguments
from blip2x_training.arguments.pretraining import Stage1Arguments
from blip2x_training.data.image_processor import load_image_processor
from blip2x_training.data.splits import load_splits
from blip2x_training.data.vocabulary import build_tokenizer, load_qformer_tokenizer
from blip2x_training.engine.fit import already_finished, fit
from blip2x_training.engine.start import start_run
from blip2x_training.engine.tasks import image_text_task
from blip2x_training.models.loading import read_stage1_config
from blip2x_training.system.commands import run_command
from blip2x_training.system.processes import folder_of_run
from modeling_blip2x import Blip2xForPreTraining, Blip2xProcessor, Blip2xQFormerConfig
from modeling_blip2x.configuration_blip2x import OBJECTIVES


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Stage1Arguments, sys.argv[1:] if argv is None else argv)
    # DDP waits for the gradient of every parameter, unless told that the heads of objectives left out get none.
    accelerator = start_run(args, unused_parameters=set(args.objectives) != set(OBJECTIVES))
    with folder_of_run(args.output_dir, accelerator):
        run(args, accelerator)


def run(args: Stage1Arguments, accelerator: Accelerator) -> None:
    """Data, model and processor by the fields, and the training of them."""
    if args.init_from:
        read_stage1_config(args.init_from)  # before anything slow

    image_processor = load_image_processor(args.init_from or args.vision_model, args.image_size)
    train_set, eval_set = load_splits(args, accelerator, image_processor)
    # Asked before the model is built, so that repeating a finished command costs seconds.
    if already_finished(args, accelerator, train_set, eval_set):
        return

    if args.init_from:
        changed = {"itc_loss": args.itc_loss, "query_spread": args.query_spread}
        changed = {name: value for name, value in changed.items() if value is not None}
        model = Blip2xForPreTraining.from_pretrained(args.init_from, **changed)
        model.config.objectives = args.objectives  # all weights are there whatever the checkpoint was trained with
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
            itc_loss=args.itc_loss or "softmax",
            query_spread=args.query_spread or 0.0,
        )
    processor = Blip2xProcessor(image_processor, tokenizer)
    model.freeze_unimodal()
    model.config.qformer_config.mask_token_id = tokenizer.mask_token_id
    if args.word_dropout and tokenizer.mask_token_id is None:
        raise ValueError(
            f"--word_dropout is {args.word_dropout}, but the Q-Former's tokenizer has no mask_token to read in place of words. "
            "Leave it out."
        )
    shape = model.config.qformer_config
    if model.config.query_spread and max(shape.hidden_dropout_prob, shape.attention_probs_dropout_prob) > 0:
        accelerator.print(
            "--query_spread is on, but the Q-Former has dropout, whose noise passes for a distance between queries: they may "
            "become one all the same. Take it out: trim_bert.py --dropout 0, or hidden_dropout_prob and "
            "attention_probs_dropout_prob 0 in --qformer_config."
        )
    task = image_text_task(args, accelerator, model, processor, eval_set)
    fit(args, accelerator, model, processor, train_set, eval_set, task)


def qformer_config(fields: dict | None, tokenizer) -> Blip2xQFormerConfig:
    """A Q-Former of the given shape with a vocabulary that fits the tokenizer."""
    return Blip2xQFormerConfig(
        **{
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "mask_token_id": tokenizer.mask_token_id,
            **(fields or {}),
        }
    )


def command() -> None:
    """main, with a mistake told in one line: the installed command."""
    run_command(main)


if __name__ == "__main__":
    command()
