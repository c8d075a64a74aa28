"""Files of an evaluation: metrics, predictions, and the predictions in the format of the official server or script."""

import json
from pathlib import Path

from ..system.atomic_files import write_whole
from ..system.utf8 import json_bytes
from .fields import EvaluationArguments
from .samples import EvaluationSet
from .scoring import as_items


def official_results(args: EvaluationArguments, records: list[dict], data: EvaluationSet) -> tuple[str, str] | None:
    """Name and content of the official file; None for tasks that no server scores.

    Servers refuse a file in which a question or an image is missing, and count lines: what has no prediction, since its
    image is missing or broken, is answered with an empty text. All is in the order of the data.

    COCO and NoCaps: [{image_id, caption}]. VQAv2 and OK-VQA: [{question_id, answer}]. GQA: [{questionId, prediction}].
    DAQUAR: a line an answer, in the order of the questions.
    """
    texts = [""] * len(data.asked)
    for record in records:
        texts[data.places[record["number"]]] = record["prediction"]
    answered = list(zip(data.asked, texts))
    if args.task == "caption":
        rows = [{"image_id": one.image_id, "caption": text} for one, text in answered]
    elif args.task != "vqa":
        return None
    elif args.benchmark == "gqa":
        rows = [{"questionId": str(one.question_id), "prediction": text} for one, text in answered]
    elif args.benchmark == "daquar":
        return "results.txt", "".join(as_items(text) + "\n" for text in texts)
    else:
        rows = [{"question_id": one.question_id, "answer": text} for one, text in answered]
    return "results.json", json.dumps(rows, ensure_ascii=False)


def unanswered(args: EvaluationArguments, data: EvaluationSet, records: list[dict]) -> list[str]:
    """A note where the official file has empty answers in place of predictions."""
    count = len(data.asked) - len(records)
    if not count or args.task not in ("caption", "vqa"):
        return []
    return [f"{count} of {len(data.asked)} answers for the server are empty: see skipped.json."]


def write_json(path: Path, content: object) -> None:
    write_whole(path, json_bytes(json.dumps(content, ensure_ascii=False, indent=1)))


def write_results(
    output_dir: Path,
    args: EvaluationArguments,
    records: list[dict],
    skipped: list[dict],
    summary: dict,
    data: EvaluationSet,
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
    official = official_results(args, records, data)
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
