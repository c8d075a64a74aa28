"""report.html, a page in one file, and report.png: figures beside the published ones, what was predicted, best and worst."""

import base64
import io
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from modeling_blip2x.images_blip2x import rgb_image

from ...system.atomic_files import write_whole
from ..evaluated_model import Checkpoint
from ..samples import EvaluationSet
from .attention import query_maps
from .bars import Bars, score_bars, type_bars
from .cases import REFERENCES, choose_records, heading, image_label, score_text, tone, wanted
from .figures import figure_table, label, overall, published_figures, shown, sorted_notes, title_of

QUERIES = 8
PICTURE_SIDE = 320  # pixels of an embedded image
DRAWING, BASE, HIGHEST = 600, 190, 150  # pixels of the page's bar chart: width, baseline, tallest bar


def write_report(
    output_dir: Path, summary: dict, records: list[dict], data: EvaluationSet, checkpoint: Checkpoint
) -> list[Path]:
    """Write both; returns their paths."""
    task = summary["protocol"]["task"]
    sections = {
        heading(title, chosen, records, task): chosen for title, chosen in choose_records(records, task).items()
    }
    looked_at = next(iter(sections.values()))[0] if sections else None
    heat = heat_maps(looked_at, data, checkpoint) if looked_at else []
    heat_name = name_of(looked_at, data) if looked_at else ""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    page = environment.get_template("report.html.jinja").render(
        **page_values(summary, records),
        sections=[
            {"title": title, "cards": [card_of(record, data, task) for record in chosen]}
            for title, chosen in sections.items()
        ],
        heat=[{"name": name, "source": embedded(picture)} for name, picture in heat],
        heat_name=heat_name,
        heat_question=looked_at.get("question", "") if looked_at else "",
    )
    write_whole(output_dir / "report.html", page.encode())
    from .picture import write_picture  # matplotlib takes a second to import

    return [output_dir / "report.html", write_picture(output_dir, summary, records, sections, data, heat, heat_name)]


def page_values(summary: dict, records: list[dict]) -> dict:
    """What the page's template names, but for pictures."""
    metrics, published = overall(summary["metrics"]), published_figures(summary)
    columns = [name for name in metrics if any(name in figures for figures in published.values())]
    heads, rows = figure_table(summary)
    bars = score_bars(records, summary["protocol"]["task"])
    main = label(summary["main_metric"])
    return {
        "title": title_of(summary),
        "counts": counted(summary["counts"]),
        "notes": sorted_notes(summary["notes"]),
        "heads": heads,
        "figures": [{"name": name, "cells": cells, "main": name == main} for name, cells in rows],
        "columns": [label(name) for name in columns],
        "published": [
            {"name": name, "ours": figures is metrics, "cells": [shown(figures.get(c)) for c in columns]}
            for name, figures in ({"this evaluation": metrics, **published} if published else {}).items()
        ],
        "types": {label(kind): types for kind, types in type_bars(summary["metrics"], records).items()},
        "protocol": [(name.replace("_", " "), value) for name, value in summary["protocol"].items()],
        "bars": bars and drawing_of(bars),
    }


def counted(counts: dict[str, int]) -> str:
    """Samples, how many were scored, and whatever else there was."""
    named = {name.replace("_", " "): value for name, value in counts.items()}
    return ", ".join(
        f"{value} {name}" for name, value in named.items() if value or name in ("samples", "scored", "skipped")
    )


def name_of(record: dict, data: EvaluationSet) -> str:
    return image_label(record, data.samples[record["number"]].row)


def card_of(record: dict, data: EvaluationSet, task: str) -> dict:
    """What a card shows of a record."""
    references = wanted(record, task)
    return {
        "source": embedded(data.image_of(record["number"])),
        "name": name_of(record, data),
        "question": record.get("question", ""),
        "said": record["prediction"] or "(nothing)",
        "score": score_text(record, task),
        "tone": tone(record, task),
        "references": references[:REFERENCES],
        "more": max(0, len(references) - REFERENCES),
    }


def embedded(image: Image.Image) -> str:
    """A small JPEG as data URI."""
    small = rgb_image(image)
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def drawing_of(bars: Bars) -> dict:
    """Bars and ticks of the page's drawing, 640 x 240."""
    step = min(DRAWING / len(bars.counts), 110)
    drawn = []
    for number, (count, colour) in enumerate(zip(bars.counts, bars.tones)):
        height = round(HIGHEST * count / max(*bars.counts, 1), 1)
        place = {"x": 20 + step * number + 2, "y": BASE - height, "width": step - 4, "height": height}
        drawn.append(place | {"count": count, "tone": colour})
    ticks = [{"x": 20 + step * place, "label": text} for place, text in bars.ticks]
    width = step * len(bars.counts)
    return {"title": bars.title, "across": bars.across, "up": bars.up, "note": bars.note, "width": width} | {
        "drawn": drawn,
        "ticks": ticks,
    }


def heat_maps(record: dict, data: EvaluationSet, checkpoint: Checkpoint) -> list[tuple[str, Image.Image]]:
    """A record's image under the queries' mean attention, as it is, and under the attention of single queries."""
    item = data[0, record["number"]]
    maps = query_maps(checkpoint, item)
    if maps is None:
        return []
    picture = checkpoint.processor.seen_picture(item["image"])
    draw = checkpoint.processor.draw_attention
    chosen = np.unique(np.linspace(0, len(maps) - 1, min(QUERIES, len(maps))).round().astype(int))
    single = [(f"query {number}", draw(picture, maps[number])) for number in chosen]
    return [(f"mean of {len(maps)} queries", draw(picture, maps.mean(0))), ("the image", picture), *single]
