"""BLIP-2 on a folder of photographs, in one command: both stages, evaluation, report.

    python training/photos.py --dataset DIR --vision_model V --language_model L --output_dir O [--qformer_init BERT]

DIR holds photos with captions, as everywhere (docs/data.md): the simplest is a folder of them with a metadata.jsonl of
lines like {"file_name": "dog.jpg", "captions": ["a dog in the snow", "a brown dog runs"]}. How long is trained follows
from how many there are; of data without a validation split, the last tenth is kept for it.

Written to O: features/ of the frozen tower, bert/ (BERT cut to the captions' words), stage1/ and stage2/ (checkpoints with
curves), evaluation/ of each, and report.html. The same command again continues where the last one stopped.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from blip2x_training.arguments.base import BIG, Arguments, doc
from blip2x_training.arguments.parsing import CONFIGS, parse_arguments
from blip2x_training.system.commands import run_command

SMALL_QFORMER = {  # for a Q-Former that starts from nothing: BERT's shape would take days on two cores
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "max_position_embeddings": 64,
    "initializer_range": 0.033,  # .65 / sqrt(hidden_size)
    "hidden_dropout_prob": 0.0,  # as BERT's below: the noise of dropout would pass for a distance between queries
    "attention_probs_dropout_prob": 0.0,
}
# Seconds on two cores of Flickr8k's run (docs/photos.md): an image through MobileNetV2, a pair of each stage's step with
# SmolLM2-135M, an image captioned by either with 3 beams, and ranked.
SECONDS = {"feature": 0.03, "stage1": 0.017, "stage2": 0.06, "retrieval": 0.6, "itg": 0.3, "caption": 1.0, "start": 20}
BEAMS = 3
RERANKED = 16  # candidates of each photo and caption that ITM ranks again


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
    stage1_steps: int | None = doc(None, "Steps of stage 1; null: ten passes over the captions, 4700 at most.")
    stage2_steps: int | None = doc(None, "Steps of stage 2; null: four passes over the captions, 3800 at most.")
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
    from blip2x_training.photo_run.photo_report import write_report
    from blip2x_training.photo_run.plan import Plan
    from blip2x_training.photo_run.time_left import Progress

    output = Path(args.output_dir)
    plan: Plan = claim(args)
    print(f"{plan}\n{plan.expectation}", flush=True)
    bert, features, first, second, scored = (
        output / name for name in ("bert", "features", "stage1", "stage2", "evaluation")
    )
    data = ["--dataset", args.dataset, *optional(image_folder=args.image_folder)]
    texts = optional(text_column=args.text_column)
    bf16 = ["--bf16", str(args.bf16)]
    progress = Progress(expected_seconds(args, plan), output / "times.json")

    def cut_bert() -> None:
        if not (bert / "config.json").exists():
            spread = ["--initializer_range", "0.033", "--dropout", "0"]
            trim_bert.main(
                ["--bert", args.qformer_init, *data[:2], *texts, "--train_split", plan.train_split, *spread]
                + ["--output_dir", str(bert)]
            )

    def cache() -> None:
        cache_features.main(
            [*data, "--vision_model", args.vision_model, "--output_dir", str(features), "--views", str(plan.views)]
            + ["--splits", plan.train_split, plan.eval_split, "--seed", str(args.seed)]
        )

    training = [*data, *texts, "--train_split", plan.train_split, "--eval_split", plan.eval_split]
    training += ["--feature_cache", str(features), "--augment", "false", "--seed", str(args.seed), *bf16]

    def stage1() -> None:
        begun = ["--qformer_init", str(bert), "--pretrained_lr_scale", "0.33"]
        new = begun if args.qformer_init else ["--qformer_config", json.dumps(SMALL_QFORMER)]
        pretrain_stage1.main(
            ["--config", str(CONFIGS / "photos_stage1.yaml"), "--output_dir", str(first), *training, *new]
            + ["--vision_model", args.vision_model, *schedule(plan.stage1)]
            + ["--hard_negative_steps", str(plan.stage1.steps)]
        )

    def stage2() -> None:
        pretrain_stage2.main(
            ["--config", str(CONFIGS / "photos_stage2.yaml"), "--output_dir", str(second), *training]
            + ["--init_from", str(first), "--language_model", args.language_model, "--prompt", args.prompt]
            + [*schedule(plan.stage2), *optional(lora=args.lora)]
        )

    def evaluate(name: str, model: Path, *more: str) -> None:
        run_evaluation.main(
            ["--model", str(model), "--data", args.dataset, "--split", plan.eval_split, *data[2:], *texts, *more]
            + ["--output_dir", str(scored / name), "--java_metrics", "false", *bf16]
        )

    parts = {
        "BERT, cut to the words of the captions": cut_bert,
        "features of the frozen tower": cache,
        "stage 1": stage1,
        "retrieval by stage 1": lambda: evaluate(
            "retrieval", first, "--task", "retrieval", "--score_mode", "itm+itc", "--rerank_k", str(RERANKED)
        ),
        "captions by stage 1's ITG head": lambda: evaluate(
            "stage1_captions", first, "--task", "caption", "--num_beams", str(BEAMS)
        ),
        "stage 2": stage2,
        "captions by stage 2": lambda: evaluate(
            "stage2_captions", second, "--task", "caption", "--num_beams", str(BEAMS)
        ),
    }
    for name in progress.expected:
        progress.run(name, parts[name])
    report = write_report(output, asdict(args), plan, progress)
    print(f"\n{progress}\nReport: {report}")
    print(f"Models to load: {second} (writes), {first} (scores images against texts)")
    print(f"To see it in a browser: python space_app/app.py --model {output}")


def claim(args: PhotosArguments):
    """The plan of the output folder, made at its first run and kept in plan.json.

    Raises ValueError for a folder that was made with other arguments.
    """
    from blip2x_training.data.caption_dataset import read_captions
    from blip2x_training.data.formats import load_rows
    from blip2x_training.photo_run.plan import Plan, choose_splits, make_plan
    from blip2x_training.system.atomic_files import write_whole
    from blip2x_training.system.json_lines import read_json_object

    kept = Path(args.output_dir) / "plan.json"
    asked = {name: value for name, value in asdict(args).items() if name != "output_dir"}
    if kept.exists():
        known = read_json_object(kept, "Choose another --output_dir.")
        other = [name for name, value in asked.items() if known["arguments"].get(name) != value]
        if other:
            was = known["arguments"].get(other[0])
            raise ValueError(
                f"{args.output_dir} was made with --{other[0]} {was}, not {asked[other[0]]}. Pass that to continue it, or "
                "another --output_dir."
            )
        return Plan.read(known["plan"])
    splits = choose_splits(args.dataset, args.image_folder, args.train_split, args.eval_split)
    rows = load_rows(args.dataset, splits[0], args.image_folder)
    texts = read_captions(rows, args.text_column, True)
    validated = len(load_rows(args.dataset, splits[1], args.image_folder))
    plan = make_plan(splits, len(rows), len(texts), validated, (args.stage1_steps, args.stage2_steps))
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_whole(kept, json.dumps({"arguments": asked, "plan": asdict(plan)}, indent=1).encode())
    return plan


def optional(**fields: str | None) -> list[str]:
    """Flags of those that are given."""
    return [word for name, value in fields.items() if value is not None for word in (f"--{name}", value)]


def schedule(stage) -> list[str]:
    """Flags of a stage's length: five validations, and a checkpoint every few minutes."""
    every = max(1, stage.steps // 5)
    return [
        *("--max_steps", str(stage.steps), "--per_device_train_batch_size", str(stage.batch)),
        *("--eval_steps", str(every), "--save_steps", str(min(every, 250))),
    ]


def expected_seconds(args: PhotosArguments, plan) -> dict[str, float]:
    """Of each part, in the order in which they run, if photos, tower and language model were those of docs/photos.md."""
    seconds = {
        "BERT, cut to the words of the captions": 0,
        "features of the frozen tower": SECONDS["feature"] * (plan.views * plan.images + plan.eval_images),
        "stage 1": SECONDS["stage1"] * plan.stage1.steps * plan.stage1.batch,
        "retrieval by stage 1": SECONDS["retrieval"] * plan.eval_images,
        "captions by stage 1's ITG head": SECONDS["itg"] * plan.eval_images,
        "stage 2": SECONDS["stage2"] * plan.stage2.steps * plan.stage2.batch,
        "captions by stage 2": SECONDS["caption"] * plan.eval_images,
    }
    if not args.qformer_init:
        del seconds["BERT, cut to the words of the captions"]
    return {name: SECONDS["start"] + value for name, value in seconds.items()}


def command() -> None:
    """main, with a mistake told in one line: the installed command."""
    run_command(main)


if __name__ == "__main__":
    command()
