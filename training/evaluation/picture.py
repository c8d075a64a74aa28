"""report.png: the report's figures, histogram, samples and heat map in one picture."""

import textwrap
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot: it would keep every figure and look for a screen
from PIL import Image

from evaluation.report import bins_of, shown, title_of
from evaluation.samples import EvaluationSet

COLUMNS, WRAP, LINES = 4, 38, 3
INK, SOFT, BAR, GOOD, BAD = "#1c1d1f", "#5d6168", "#3566a8", "#18764a", "#b3372c"


def write_picture(
    output_dir: Path,
    summary: dict,
    records: list[dict],
    sections: dict[str, list[dict]],
    data: EvaluationSet,
    heat: list[tuple[str, Image.Image]],
) -> Path:
    rows = [
        (title, chosen[start : start + COLUMNS])
        for title, chosen in sections.items()
        for start in range(0, len(chosen), COLUMNS)
    ]
    figure = Figure(figsize=(14, 4 + 3.6 * len(rows)), layout="constrained", facecolor="white")
    figure.suptitle(title_of(summary), fontsize=15, fontweight="bold", color=INK)
    parts = figure.subfigures(1 + len(rows), 1, height_ratios=[4] + [3.6] * len(rows), squeeze=False)[:, 0]
    figures, scores, picture = parts[0].subplots(1, 3, width_ratios=[5, 4, 3])
    draw_figures(figures, summary)
    draw_histogram(scores, summary, records)
    picture.set_axis_off()
    if heat:
        picture.imshow(heat[0][1])
        picture.set_title("where the queries look (mean)", fontsize=10, color=INK)
    before = None
    for part, (title, chosen) in zip(parts[1:], rows):
        part.suptitle(title if title != before else " ", fontsize=12, fontweight="bold", color=INK, x=0.01, ha="left")
        before = title
        for axis, record in zip(part.subplots(1, COLUMNS, squeeze=False)[0], [*chosen, *[None] * COLUMNS]):
            if record is None:
                axis.set_axis_off()
            else:
                draw_record(axis, record, data, summary)
    target = output_dir / "report.png"
    figure.savefig(target, dpi=90)
    return target


def draw_figures(axis, summary: dict) -> None:
    """The metrics as a table, published ones beside."""
    axis.set_axis_off()
    plain = {name: value for name, value in summary["metrics"].items() if "/" not in name}
    published = {model: figures for model, figures in summary["published"].items() if figures.keys() & plain.keys()}
    models = list(published)[:3]
    names = sorted(
        plain, key=lambda name: (name != summary["main_metric"], not any(name in f for f in published.values()))
    )[:9]
    if not names:
        return
    cells = [[shown(plain[name]), *[shown(published[model].get(name)) for model in models]] for name in names]
    heads = ["this evaluation", *[textwrap.fill(model, 14) for model in models]]
    table = axis.table(
        cells, rowLabels=names, colLabels=heads, loc="center", cellLoc="right", colLoc="right", edges="horizontal"
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.35)
    for (row, column), cell in table.get_celld().items():
        cell.set_edgecolor("#dddfe2")
        cell.set_text_props(color=SOFT if row == 0 else INK, fontweight="bold" if column == 0 and row else "normal")
        if row == 0:
            cell.set_height(cell.get_height() * 2.4)


def draw_histogram(axis, summary: dict, records: list[dict]) -> None:
    found = bins_of(summary, records)
    if found is None:
        axis.set_axis_off()
        return
    heights, edges = found
    bars = axis.bar(edges[:-1], heights, width=0.92 * (edges[1] - edges[0]), align="edge", color=BAR)
    axis.bar_label(bars, [count or "" for count in heights.tolist()], fontsize=8, color=SOFT)
    axis.set_title(summary["score_name"], fontsize=10, color=INK)
    axis.set_yticks([])
    axis.tick_params(labelsize=8, colors=SOFT)
    for side in ("top", "left", "right"):
        axis.spines[side].set_visible(False)


def draw_record(axis, record: dict, data: EvaluationSet, summary: dict) -> None:
    """An image; above it question and prediction, below it score and a reference."""
    image = data.image_of(record["number"])
    image.thumbnail((420, 420))
    axis.imshow(image)
    axis.set(xticks=[], yticks=[], frame_on=False)
    score = record.get("score")
    colour = INK if score is None else GOOD if score >= summary["middle_score"] else BAD
    question = [brief(record["question"], 2)] if record.get("question") else []
    axis.set_title("\n".join([*question, brief(record["prediction"] or "(nothing)", LINES)]), fontsize=9.5, color=INK)
    said = f"rank {record['rank']}" if "rank" in record else "" if score is None else f"{score:.0f}"
    wanted = f"wanted: {record['references'][0]}" if record["references"] else ""
    below = "\n".join(filter(None, [said, brief(wanted, 2)]))
    axis.set_xlabel(below, fontsize=8.5, color=colour)


def brief(text: str, lines: int) -> str:
    """Wrapped and cut; $ would start a formula."""
    return "\n".join(textwrap.wrap(text, WRAP, max_lines=lines, placeholder=" ...")).replace("$", r"\$")
