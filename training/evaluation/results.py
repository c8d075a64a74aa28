"""Files of an evaluation: metrics, predictions, and the predictions in the format of the official server or script."""

import json
from pathlib import Path

from ..system.atomic_files import write_whole
from ..system.utf8 import json_bytes
from .fields import EvaluationArguments
from .scoring import as_items


def official_results(args: EvaluationArguments, records: list[dict]) -> tuple[str, str] | None:
    """Name and content of the official file; None for tasks that no server scores.

    COCO and NoCaps: [{image_id, caption}]. VQAv2 and OK-VQA: [{question_id, answer}]. GQA: [{questionId, prediction}].
    DAQUAR: a line an answer, in the order of the questions.
    """
    if args.task == "caption":
        rows = [{"image_id": record["image_id"], "caption": record["prediction"]} for record in records]
    elif args.task != "vqa":
        return None
    elif args.benchmark == "gqa":
        rows = [{"questionId": str(one["question_id"]), "prediction": one["prediction"]} for one in records]
    elif args.benchmark == "daquar":
        return "results.txt", "".join(as_items(record["prediction"]) + "\n" for record in records)
    else:
        rows = [{"question_id": record["question_id"], "answer": record["prediction"]} for record in records]
    return "results.json", json.dumps(rows, ensure_ascii=False)


def write_json(path: Path, content: object) -> None:
    write_whole(path, json_bytes(json.dumps(content, ensure_ascii=False, indent=1)))


def write_results(
    output_dir: Path, args: EvaluationArguments, records: list[dict], skipped: list[dict], summary: dict
) -> list[Path]:
    """metrics.json, predictions.json, skipped.json where anything was, and the official file where there is one.

    Returns their paths.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "metrics.json", summary)
    write_json(output_dir / "predictions.json", records)
    written = [output_dir / "metrics.json", output_dir / "predictions.json"]
    (output_dir / "skipped.json").unlink(missing_ok=True)
    if skipped:
        write_json(output_dir / "skipped.json", skipped)
        written.append(output_dir / "skipped.json")
    official = official_results(args, records)
    if official is not None:
        write_whole(output_dir / official[0], official[1].encode())
        written.append(output_dir / official[0])
    return written


def table(summary: dict) -> str:
    """The protocol and the figures as lines for the terminal."""
    published = summary["published"]
    shown = {name: value for name, value in summary["metrics"].items() if not name.startswith("question_type/")}
    lines = [f"{name:<24}{value:>9.2f}" for name, value in shown.items()]
    for model, figures in published.items():
        lines.append(f"published, {model}: " + ", ".join(f"{name} {value}" for name, value in figures.items()))
    lines.append(", ".join(f"{value} {name.replace('_', ' ')}" for name, value in summary["counts"].items()))
    return "\n".join([*lines, *summary["notes"]])
