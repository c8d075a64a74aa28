"""report.html, a page in one file, and report.png: figures beside the published ones, what was predicted, best and worst."""

import base64
import io
from pathlib import Path

import numpy as np
from captioned_rows import write_whole
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from evaluation.attention import overlay, query_maps, seen_picture
from evaluation.models import Checkpoint
from evaluation.samples import EvaluationSet

SHOWN, EXTREMES, REFERENCES, QUERIES = 8, 4, 5, 8
PICTURE_SIDE = 320  # pixels of an embedded image
BINS = 10
SCORE_NAMES = {
    "caption": "CIDEr of a caption",
    "vqa": "credit of an answer, percent",
    "retrieval": "100 / rank of an image's best own text",
    "classification": "right (100) or wrong (0)",
}
SHORT_NAMES = {"caption": "CIDEr", "vqa": "credit", "classification": "credit"}
TITLES = {"caption": "Captions", "vqa": "Answers", "retrieval": "Retrieval", "classification": "Classes"}
FIXED_SCALE = ("vqa", "retrieval", "classification")  # scores from 0 to 100


def write_report(
    output_dir: Path, summary: dict, records: list[dict], data: EvaluationSet, checkpoint: Checkpoint
) -> list[Path]:
    """Write both; returns their paths."""
    sections = choose_records(records)
    heat = heat_maps(records, data, checkpoint) if records else []
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    page = environment.get_template("report.html.jinja").render(
        **page_values(summary, records),
        sections=[
            {"title": title, "cards": [card_of(record, data, summary) for record in chosen]}
            for title, chosen in sections.items()
        ],
        heat=[{"name": name, "source": embedded(picture)} for name, picture in heat],
    )
    write_whole(output_dir / "report.html", page.encode())
    from evaluation.picture import write_picture  # matplotlib takes a second to import

    return [output_dir / "report.html", write_picture(output_dir, summary, records, sections, data, heat)]


def choose_records(records: list[dict]) -> dict[str, list[dict]]:
    """Records to show by title: the best and worst, the first of equals, and evenly spread ones of the others."""
    ordered = sorted((record for record in records if "score" in record), key=lambda record: record["score"])
    count = min(EXTREMES, len(ordered) // 3)
    best = of_different_images(sorted(ordered, key=lambda record: -record["score"]))[:count]
    worst = of_different_images(ordered)[:count]
    taken = {record["number"] for record in best + worst}
    others = [record for record in records if record["number"] not in taken]
    spread = np.unique(np.linspace(0, len(others) - 1, min(SHOWN, len(others))).round().astype(int)) if others else []
    sections = {"Evenly spread": [others[number] for number in spread], "Best": best, "Worst": worst}
    return {title: chosen for title, chosen in sections.items() if chosen}


def of_different_images(records: list[dict]) -> list[dict]:
    """The first record of each image, in order."""
    first = {}
    for record in records:
        first.setdefault(record["image_id"], record)
    return list(first.values())


def page_values(summary: dict, records: list[dict]) -> dict:
    """What the page's template names, but for pictures."""
    metrics, published = summary["metrics"], summary["published"]
    plain = {name: value for name, value in metrics.items() if "/" not in name}
    columns = [name for name in plain if any(name in figures for figures in published.values())]
    rows = {"this evaluation": metrics, **published}
    return {
        "title": title_of(summary),
        "counts": counted(summary["counts"]),
        "notes": summary["notes"],
        "figures": [
            {"name": name.replace("_", " "), "value": shown(value), "main": name == summary["main_metric"]}
            for name, value in plain.items()
        ],
        "columns": columns,
        "published": [
            {"name": name, "ours": figures is metrics, "cells": [shown(figures.get(c)) for c in columns]}
            for name, figures in (rows if columns else {}).items()
        ],
        "by_type": [(name, shown(value)) for name, value in metrics.items() if "/" in name],
        "protocol": [(name.replace("_", " "), value) for name, value in summary["protocol"].items()],
        "histogram": histogram_of(summary, records),
    }


def title_of(summary: dict) -> str:
    protocol = summary["protocol"]
    names = ", ".join(Path(part).name for part in protocol["data"].split(","))
    return f"{TITLES[protocol['task']]}: {summary['name']} on {names}, {protocol['split']}"


def counted(counts: dict[str, int]) -> str:
    """Samples, how many were scored, and whatever else there was."""
    named = {name.replace("_", " "): value for name, value in counts.items()}
    return ", ".join(
        f"{value} {name}" for name, value in named.items() if value or name in ("samples", "scored", "skipped")
    )


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if abs(value) >= 1 else f"{value:.2f}"


def card_of(record: dict, data: EvaluationSet, summary: dict) -> dict:
    """What a card shows of a record."""
    score, text = record.get("score"), ""
    if "rank" in record:
        text = f"rank {record['rank']}"
    elif score is not None:
        text = f"{SHORT_NAMES[summary['protocol']['task']]} {score:.0f}"
    if "itc_score" in record:
        text += f", ITC {record['itc_score']:.0f}"
    tone = "" if score is None else "good" if score >= summary["middle_score"] else "bad"
    return {
        "source": embedded(data.image_of(record["number"])),
        "name": record["image"],
        "question": record.get("question", ""),
        "said": record["prediction"] or "(nothing)",
        "score": text,
        "tone": tone,
        "references": list(dict.fromkeys(record["references"]))[:REFERENCES],
    }


def embedded(image: Image.Image) -> str:
    """A small JPEG as data URI."""
    small = image.convert("RGB")
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def bins_of(summary: dict, records: list[dict]) -> tuple[np.ndarray, np.ndarray] | None:
    """Counts and edges of the scores' histogram; None without scores."""
    scores = [record["score"] for record in records if "score" in record]
    if not scores:
        return None
    top = 100.0 if summary["protocol"]["task"] in FIXED_SCALE else max(max(scores), 1.0)
    return np.histogram(np.clip(scores, 0, top), bins=BINS, range=(0, top))


def histogram_of(summary: dict, records: list[dict]) -> dict | None:
    """Bars and ticks of the page's drawing, 640 x 220."""
    found = bins_of(summary, records)
    if found is None:
        return None
    heights, edges = found
    bars = []
    for number, count in enumerate(heights.tolist()):
        height = round(150 * count / max(heights.max(), 1), 1)
        label = f"{count} from {edges[number]:.0f} to {edges[number + 1]:.0f}"
        bars.append(
            {"x": 22 + 60 * number, "y": 190 - height, "width": 56, "height": height, "count": count, "label": label}
        )
    ticks = [{"x": 20 + 60 * number, "label": f"{edge:.0f}"} for number, edge in enumerate(edges)]
    return {"title": summary["score_name"], "bars": bars, "ticks": ticks}


def heat_maps(records: list[dict], data: EvaluationSet, checkpoint: Checkpoint) -> list[tuple[str, Image.Image]]:
    """The first shown image under the queries' mean attention, and under that of single queries."""
    item = data[0, records[0]["number"]]
    maps = query_maps(checkpoint, item)
    if maps is None:
        return []
    picture = seen_picture(checkpoint, item["image"])
    chosen = np.unique(np.linspace(0, len(maps) - 1, min(QUERIES, len(maps))).round().astype(int))
    single = [(f"query {number}", overlay(picture, maps[number])) for number in chosen]
    return [(f"mean of {len(maps)} queries", overlay(picture, maps.mean(0))), *single]
