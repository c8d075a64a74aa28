"""BLIP-2 on a folder of photographs, in one command: both stages, evaluation, report.

    python training/photos.py --dataset DIR --vision_model V --language_model L --output_dir O [--qformer_init BERT]

DIR holds photos with captions, as everywhere (docs/data.md): the simplest is a folder of them with a metadata.jsonl of
lines like {"file_name": "dog.jpg", "captions": ["a dog in the snow", "a brown dog runs"]}. How long is trained follows
from how many there are; of data without a validation split, the last tenth is kept for it.

Written to O: features/ of the frozen tower, bert/ (BERT cut to the captions' words), stage1/ and stage2/ (checkpoints with
curves), evaluation/ of each, and report.html. The same command again continues where the last one stopped.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from blip2x_training.arguments.base import BIG, Arguments, doc
from blip2x_training.arguments.parsing import parse_arguments
from blip2x_training.system.commands import run_command


@dataclass
class PhotosArguments(Arguments):
    """Both stages, their evaluation and a report on a data set of photographs."""

    dataset: str | None = doc(None, "Photos with captions, as --dataset of the other scripts. Required.")
    vision_model: str | None = doc(None, "Id or folder of the frozen vision tower. Required.")
    language_model: str | None = doc(None, "Id or folder of the frozen language model. Required.")
    output_dir: str | None = doc(None, "Folder of everything that is made. Required.")
    qformer_init: str | None = doc(
        None,
        "Id or folder of a small BERT that the Q-Former starts from; null starts from nothing, which takes more data.",
    )
    image_folder: str | None = doc(None, "Where relative paths of images in JSON files start; null: at the JSON file.")
    text_column: str | None = doc(None, "Column with the captions; null finds it.")
    train_split: str = doc("train", "Split to train on.")
    eval_split: str | None = doc(None, "Split to validate on; null: validation, or the last tenth of train_split.")
    prompt: str = doc("a photo of", "What the language model reads between the image and the caption.")
    stage1_steps: int | None = doc(None, "Steps of stage 1; null: five passes over the captions, 2400 at most.")
    stage2_steps: int | None = doc(None, "Steps of stage 2; null: two passes over the captions, 1900 at most.")
    lora: str | None = doc(
        None, "As in pretrain_stage2.py: lm also trains an adapter of the language model in stage 2."
    )
    bf16: bool = doc(True, "bfloat16 autocast in training and evaluation; false where the processor has no bfloat16.")
    seed: int = doc(42, "As in training.")

    REQUIRED = ("dataset", "vision_model", "language_model", "output_dir")
    PATHS = ("dataset", "vision_model", "language_model", "qformer_init", "image_folder")
    RANGES = {"stage1_steps": (1, BIG), "stage2_steps": (1, BIG), "seed": (0, 2**32 - 1)}


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(PhotosArguments, sys.argv[1:] if argv is None else argv)
    # Both count only if set before torch is imported: threads that sleep at once halve the speed of small models, and
    # memory that goes back to the system after each step costs up to a fifth of it (docs/photos.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    from blip2x_training.system.run_lock import locked_folder

    with locked_folder(args.output_dir):
        run(args)


def run(args: PhotosArguments) -> None:
    """All parts, those that are done in seconds."""
    from blip2x_training import cache_features, pretrain_stage1, pretrain_stage2, run_evaluation, trim_bert
    from blip2x_training.photo_run.parts import parts_of
    from blip2x_training.photo_run.photo_report import write_report
    from blip2x_training.photo_run.plan import kept_plan
    from blip2x_training.photo_run.time_left import Progress

    scripts = (cache_features, pretrain_stage1, pretrain_stage2, run_evaluation, trim_bert)
    mains = {module.__name__.rpartition(".")[2]: module.main for module in scripts}
    output, plan = Path(args.output_dir), kept_plan(args)
    print(f"{plan}\n{plan.expectation}", flush=True)
    parts = parts_of(args, plan)
    progress = Progress({name: part.seconds for name, part in parts.items()}, output / "times.json")
    for name, part in parts.items():
        if part.makes is None or not part.makes.exists():
            progress.run(name, lambda part=part: mains[part.script](part.flags))
    report = write_report(output, args, plan, parts, progress)
    print(f"\n{progress}\nReport: {report}")
    print(f"Models to load: {output / 'stage2'} (writes), {output / 'stage1'} (scores images against texts)")
    print(f"To see it in a browser: python space_app/app.py --model {output}")


def command() -> None:
    """main, with a mistake told in one line: the installed command."""
    run_command(main)


if __name__ == "__main__":
    command()
