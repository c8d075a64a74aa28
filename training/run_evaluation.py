"""Evaluation of a checkpoint with the paper's protocol: metrics, predictions, official results and a report.

    python training/run_evaluation.py --model DIR --task caption --data captions_val2017.json --split all \
        --image_folder val2017 --output_dir OUT
    python training/run_evaluation.py --config training/configs/evaluation/vqav2.yaml --model DIR --data D --output_dir OUT

Tasks: caption, vqa, retrieval, classification. Checkpoints of stage 1 and 2, and transformers' own BLIP-2. Several
processes (`accelerate launch`, `torchrun`) share the work. The same command goes on where a run was stopped. --help lists
the fields.
"""

import hashlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator

from blip2x_training.arguments.parsing import parse_arguments
from blip2x_training.data.contents import describe_images
from blip2x_training.data.evaluation_formats import evaluation_rows
from blip2x_training.data.formats import image_start
from blip2x_training.data.image_processor import output_size
from blip2x_training.evaluation.choosing import class_names, label_column, name_labels, own_names, read_names
from blip2x_training.evaluation.evaluated_model import Checkpoint, check_task, load_checkpoint
from blip2x_training.evaluation.fields import FREE, EvaluationArguments, choose_prompt
from blip2x_training.evaluation.itc_score import score_by_itc
from blip2x_training.evaluation.journal import Journal
from blip2x_training.evaluation.lemmatizer import load_lemmatizer
from blip2x_training.evaluation.predict import (
    Predictions,
    choose,
    drop_unreadable,
    retrieve,
    worth_of_images,
    write_texts,
)
from blip2x_training.evaluation.published import PUBLISHED
from blip2x_training.evaluation.report.card import write_card
from blip2x_training.evaluation.report.page import write_report
from blip2x_training.evaluation.results import table, unanswered, write_results
from blip2x_training.evaluation.samples import EvaluationSet
from blip2x_training.evaluation.scoring import counts, make_records, score
from blip2x_training.system.commands import run_command
from blip2x_training.system.fingerprints import weights_fingerprint
from blip2x_training.system.processes import folder_of_run, on_main


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(EvaluationArguments, sys.argv[1:] if argv is None else argv)
    accelerator = Accelerator(mixed_precision="bf16" if args.bf16 else "no")
    with folder_of_run(args.output_dir, accelerator):
        run(args, accelerator)


def run(args: EvaluationArguments, accelerator: Accelerator) -> None:
    """From checkpoint and data to the files of the evaluation."""
    started = time.perf_counter()
    lemmatize = load_lemmatizer() if args.lemmatize else None
    checkpoint = load_checkpoint(args.model, accelerator.device, args.image_size)
    check_task(args, checkpoint)
    data, candidates = load_data(args, accelerator, checkpoint)
    protocol = protocol_of(args, checkpoint, data, candidates)
    accelerator.print("\n".join(f"{name:<20}{value}" for name, value in protocol.items()))

    num_rows = len(data.images)
    stop_if_too_many_skipped(args, data.skipped, num_rows)
    identity = identity_of(args, accelerator, checkpoint, data, candidates)
    journal = Journal(Path(args.output_dir), identity, accelerator, args.overwrite_output_dir)
    if journal.results:
        accelerator.print(f"Going on after {len(journal.results)} of {len(data)} that an earlier run has done.")
    with torch.no_grad():
        predicted = predict(args, accelerator, checkpoint, data, journal, candidates)
    itc = score_by_itc(args, accelerator, data, predicted.found) if args.scorer else {}
    worth = worth_of_images(args, accelerator, checkpoint, data, predicted.found)
    if accelerator.is_main_process:
        records, skipped = make_records(
            data.samples, predicted.found, [data.name(sample.row) for sample in data.samples]
        )
        skipped = data.skipped + skipped
        stop_if_too_many_skipped(args, skipped, num_rows)
        notes = list(checkpoint.notes) + unanswered(args, data, records)
        metrics, main_metric = score(args, records, predicted.metrics, lemmatize, notes)
        summary = {
            "model": args.model,
            "name": Path(args.model).name if Path(args.model).exists() else args.model,
            "protocol": protocol,
            "main_metric": main_metric,
            "metrics": metrics | worth | itc,
            "published": PUBLISHED.get(args.benchmark, {}),
            "counts": counts(records, skipped),
            "notes": notes,
            "seconds": round(time.perf_counter() - started, 1),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        finish(args, summary, records, skipped, data, checkpoint)
    accelerator.wait_for_everyone()


def load_data(
    args: EvaluationArguments, accelerator: Accelerator, checkpoint: Checkpoint
) -> tuple[EvaluationSet, list[str]]:
    """The samples, and the closed set of answers or classes where there is one."""
    with accelerator.main_process_first():  # the others then find what `datasets` has converted and cached
        rows = evaluation_rows(args.data, args.split, args.image_folder, args.dataset_config)
    data = EvaluationSet(
        rows,
        task=args.task,
        image_column=args.image_column,
        text_column=args.text_column,
        prompt_column=args.prompt_column,
        prompt="" if checkpoint.stage == 1 else choose_prompt(args, checkpoint.model.config)[0],
        clean_texts=args.clean_captions and args.task == "retrieval",
        clean_questions=args.clean_questions,
        folder=image_start(args.data, args.image_folder),
        name=args.data,
    )
    # Elsewhere a bad image is left out when its turn comes; here every rank depends on how many images there are.
    if args.task == "retrieval":
        drop_unreadable(accelerator, data, args.batch_size)
    if not len(data):
        raise ValueError(
            f"--data {args.data}, split {args.split!r} has no questions. Name their column: --prompt_column."
        )
    if args.other_images:
        data.exchange_images()
    if args.task == "classification":
        candidates = class_names(args.classes, rows, args.text_column)
        by_id = read_names(args.classes)[1] if args.classes else {}
        folders = own_names(rows, label_column(rows, args.text_column))
        name_classes(data, candidates, by_id, folders)
        return data, candidates
    return data, read_names(args.candidates)[0] if args.candidates else []


def name_classes(data: EvaluationSet, classes: list[str], by_id: dict[str, str], folders: list[str] | None) -> None:
    """Turn labels into names of classes; raises ValueError for one that there is no name for."""
    labels = {label for sample in data.samples for label in sample.references}
    names = name_labels(labels, classes, by_id, folders)
    for sample in data.samples:
        unknown = [label for label in sample.references if label not in names]
        if unknown:
            raise ValueError(
                f"Class {unknown[0]!r} of {data.name(sample.row)} is not among the {len(classes)} classes. Numbers count "
                "from 0."
            )
        sample.references = [names[label] for label in sample.references]


def predict(
    args: EvaluationArguments,
    accelerator: Accelerator,
    checkpoint: Checkpoint,
    data: EvaluationSet,
    journal: Journal,
    candidates: list[str],
) -> Predictions:
    if args.task == "retrieval":
        return retrieve(args, accelerator, checkpoint, data, journal)
    if candidates:
        return choose(args, accelerator, checkpoint, data, journal, candidates)
    return write_texts(args, accelerator, checkpoint, data, journal)


def protocol_of(
    args: EvaluationArguments, checkpoint: Checkpoint, data: EvaluationSet, candidates: list[str]
) -> dict[str, object]:
    """The settings that the figures depend on, as printed and stored."""
    height, width = output_size(checkpoint.processor.image_processor)
    protocol = {
        "task": args.task,
        "data": args.data,
        "split": args.split,
        "benchmark": args.benchmark or "none",
        "model": f"{args.model} (stage {checkpoint.stage})",
        "samples": len(data) + len(data.skipped),
        "image_size": f"{height} x {width}",
    }
    if (height, width) != checkpoint.own_size:
        protocol["image_size"] += " (the checkpoint's own is {} x {})".format(*checkpoint.own_size)
    if checkpoint.stage == 2:
        protocol["prompt"] = repr(data.prompt)
        protocol["prompt_from"] = choose_prompt(args, checkpoint.model.config)[1]
    if checkpoint.stage == 1 and args.task != "caption":
        protocol |= {"clean_captions": args.clean_captions, "max_text_length": args.max_text_length}
    if args.task == "retrieval":
        protocol |= {"score_mode": args.score_mode}
        protocol |= {} if args.score_mode == "itc" else {"rerank_k": args.rerank_k}
    elif candidates and checkpoint.stage == 1:
        protocol |= {"classes": len(candidates), "templates": " | ".join(args.templates), "score": "ITC cosine"}
    elif candidates:
        protocol |= {"candidates": len(candidates), "score": "mean log-likelihood of the tokens"}
    else:
        protocol |= args.generation
    if args.other_images:
        protocol |= {"images": "each sample has that of another"}
    if args.task == "vqa":
        protocol |= {"clean_questions": args.clean_questions, "lemmatize": args.lemmatize}
    return protocol | {"autocast": "bfloat16" if args.bf16 else "none"}


def identity_of(
    args: EvaluationArguments,
    accelerator: Accelerator,
    checkpoint: Checkpoint,
    data: EvaluationSet,
    candidates: list[str],
) -> dict[str, object]:
    """What decides the predictions: fields, weights, samples, images. A run goes on where it is the same."""
    rows = [sample.row for sample in data.samples]
    identity = {name: value for name, value in asdict(args).items() if name not in FREE}
    asked = json.dumps([data.fingerprint(), candidates], ensure_ascii=False).encode()
    return identity | {
        "prompt": data.prompt,
        "weights": weights_fingerprint(checkpoint.model),
        "samples": hashlib.sha256(asked).hexdigest()[:16],
        "images": on_main(accelerator, lambda: describe_images(data, rows)["images"]),
    }


def stop_if_too_many_skipped(args: EvaluationArguments, skipped: list[dict], num_rows: int) -> None:
    if len(skipped) > args.max_skip_fraction * num_rows:
        first = skipped[0]
        raise ValueError(
            f"{len(skipped)} of {num_rows} rows cannot be used, above --max_skip_fraction {args.max_skip_fraction}; the first: "
            f"row {first['row']}, {first['name']}: {first['reason']}. Repair them, check --image_folder, or raise it: figures "
            "are then over the others."
        )


def finish(
    args: EvaluationArguments,
    summary: dict,
    records: list[dict],
    skipped: list[dict],
    data: EvaluationSet,
    checkpoint: Checkpoint,
) -> None:
    """Write every file and print the figures."""
    output_dir = Path(args.output_dir)
    written = write_results(output_dir, args, records, skipped, summary, data)
    print(f"\n{table(summary)}")
    if args.report:
        written += write_report(output_dir, summary, records, data, checkpoint)
    if args.model_card:
        written += write_card(args, summary, checkpoint)
    print("Written: " + ", ".join(map(str, written)))


def command() -> None:
    """main, with a mistake told in one line: the installed command."""
    try:
        run_command(main)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from what is done.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    command()
