"""Checkpoints to evaluate: ours of either stage, and transformers' own BLIP-2, converted in memory."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xForPreTraining, Blip2xProcessor
from modeling_blip2x.convert import load_transformers

from ..data.collators import CausalLMCollator, Seq2SeqLMCollator, Stage1Collator, language_collator
from ..data.image_processor import has_other_size, output_size, resize_to
from ..models.loading import checkpoints_below, load_model
from .fields import EvaluationArguments

LONGEST_PROMPT = 512  # tokens; prompts of an evaluation are not cut
NEEDS = {  # task: which stage can do it
    "caption": (1, 2),
    "vqa": (2,),
    "retrieval": (1,),
    "classification": (1, 2),
}


@dataclass
class Checkpoint:
    """A loaded model with its processor; `notes` tell what a conversion left out.

    own_size: height and width of the images it was saved for.
    """

    model: Blip2xForPreTraining | Blip2xForConditionalGeneration
    processor: Blip2xProcessor
    notes: list[str]
    own_size: tuple[int, int]

    @property
    def stage(self) -> int:
        return 1 if self.model.config.text_config is None else 2

    def stage1_collator(self, max_text_length: int) -> Stage1Collator:
        return Stage1Collator(self.processor.image_processor, self.processor.tokenizer, max_text_length, cropped=False)

    def language_collator(self) -> CausalLMCollator | Seq2SeqLMCollator:
        longest = min(LONGEST_PROMPT, self.model.config.qformer_config.max_position_embeddings)
        return language_collator(self.model, self.processor, longest, cropped=False)


def load_checkpoint(source: str, device, image_size: int | None = None) -> Checkpoint:
    """A checkpoint of stage 1 or 2, or of transformers' blip-2 or instructblip, by folder or id.

    Raises ValueError for anything else.
    """
    if below := checkpoints_below(source):
        raise ValueError(f"--model {source} cannot be loaded.{below}")
    try:
        kind = AutoConfig.from_pretrained(source).model_type
    except (OSError, ValueError) as error:
        missing = "" if Path(source).exists() else "there is no such folder here, and as an id of the hub it "
        raise ValueError(f"--model {source}: {missing}cannot be loaded: {str(error).splitlines()[0]}") from error
    if kind in ("blip-2", "instructblip"):
        model, processor, notes = load_transformers(source)
        model.to(device)
    else:
        model, processor = load_model(source, device)
        notes = []
    own_size = output_size(processor.image_processor)
    if image_size is not None:
        resize_to(processor.image_processor, image_size)
    model.config.interpolate_pos_encoding = has_other_size(model, processor)
    return Checkpoint(model, processor, notes, own_size)


def check_task(args: EvaluationArguments, checkpoint: Checkpoint) -> None:
    """Raise ValueError where the checkpoint's stage cannot do the task."""
    if checkpoint.stage not in NEEDS[args.task]:
        wanted, what = ("2", "has a language model") if args.task == "vqa" else ("1", "scores images against texts")
        raise ValueError(
            f"--task {args.task} needs a checkpoint of stage {wanted}, which {what}; {args.model} is of stage "
            f"{checkpoint.stage}."
        )
    lacking = "itg" if args.task == "caption" else "itc"
    if checkpoint.stage == 1 and lacking not in checkpoint.model.config.objectives:
        raise ValueError(f"--task {args.task} needs {lacking.upper()}, which {args.model} was not trained with.")
    if args.task == "retrieval" and args.score_mode != "itc" and "itm" not in checkpoint.model.config.objectives:
        raise ValueError(f"{args.model} was not trained with ITM. Pass --score_mode itc.")
