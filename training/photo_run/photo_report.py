"""report.html of photos.py: the figures of all evaluations, the curves of both stages, photographs with what is written."""

import base64
import json
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from jinja2 import Environment, FileSystemLoader

from ..data.formats import image_start, load_rows
from ..evaluation.report.figures import DIRECTIONS, label, shown
from ..evaluation.report.page import embedded
from ..evaluation.samples import EvaluationSet
from ..reporting.curves import draw_curves
from ..system.atomic_files import write_whole
from .parts import Part
from .plan import Plan
from .time_left import Progress

SHOWN = 24  # photographs: evenly over the validation split, so that nobody has chosen them
EVALUATIONS = {  # folder: heading, metrics and how they are called; all of them where none is named
    "retrieval": (
        "Retrieval by stage 1, percent",
        {
            **{f"{way}_r{k}": f"{words}, R@{k}" for way, words in DIRECTIONS.items() for k in (1, 5, 10)},
            **{f"{way}_r1_itc": f"{words}, R@1 by ITC alone" for way, words in DIRECTIONS.items()},
        },
    ),
    "stage1_captions": ("Captions by stage 1's ITG head, percent", {}),
    "stage2_captions": ("Captions by the language model, percent", {}),
}


def write_report(output_dir: Path, args, plan: Plan, parts: dict[str, Part], progress: Progress) -> Path:
    """Write report.html, a page in one file; returns its path. args: PhotosArguments."""
    arguments = asdict(args)
    scored = output_dir / "evaluation"
    tables = []
    for folder, (title, names) in EVALUATIONS.items():
        metrics = read(scored / folder / "metrics.json")["metrics"]
        rows = [(names.get(name) or label(name), shown(metrics[name])) for name in names or metrics]
        tables.append({"title": title, "rows": rows, "link": f"evaluation/{folder}/report.html"})
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    page = environment.get_template("photos.html.jinja").render(
        title=f"BLIP-2 on {Path(arguments['dataset']).name}",
        plan=str(plan),
        expectation=plan.expectation,
        tables=tables,
        curves=[{"title": f"Stage {number}", "source": curves_of(output_dir / f"stage{number}")} for number in (1, 2)],
        cards=cards_of(output_dir, arguments, plan),
        arguments=[(name.replace("_", " "), value) for name, value in arguments.items() if value is not None],
        commands="\n\n".join(part.command for part in parts.values()),
        times=str(progress),
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads",
    )
    write_whole(output_dir / "report.html", page.encode())
    return output_dir / "report.html"


def read(path: Path) -> dict | list:
    return json.loads(path.read_text(encoding="utf-8"))


def curves_of(folder: Path) -> str:
    """The run's curves as data URI."""
    draw_curves(folder / "metrics.jsonl", folder / "curves.png")
    return "data:image/png;base64," + base64.b64encode((folder / "curves.png").read_bytes()).decode()


def cards_of(output_dir: Path, arguments: dict, plan: Plan) -> list[dict]:
    """Photographs of the validation split, each with what both stages write and what people wrote."""
    first, second = (read(output_dir / "evaluation" / f"stage{n}_captions" / "predictions.json") for n in (1, 2))
    by_stage1 = {record["number"]: record["prediction"] for record in first}
    data = EvaluationSet(
        load_rows(arguments["dataset"], plan.eval_split, arguments["image_folder"]),
        task="caption",
        text_column=arguments["text_column"],
        prompt="",
        folder=image_start(arguments["dataset"], arguments["image_folder"]),
        name=arguments["dataset"],
    )
    step = max(1, len(second) // SHOWN)
    return [
        {
            "source": embedded(data.image_of(record["number"])),
            "stage2": record["prediction"] or "(nothing)",
            "stage1": by_stage1.get(record["number"], ""),
            "people": record["references"][0] if record["references"] else "",
        }
        for record in second[::step][:SHOWN]
    ]
