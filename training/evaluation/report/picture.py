"""report.png: the report's figures, bars, samples and heat map in one picture."""

import textwrap
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot: it would keep every figure and look for a screen
from PIL import Image

from ..samples import EvaluationSet
from .bars import score_bars, type_bars
from .cases import score_text, tone, wanted
from .figures import figure_table, label, published_figures, shown, sorted_notes, title_of

COLUMNS, WRAP, LINES = 4, 42, 3
WIDTH, PICTURE, LINE = 14.0, 2.3, 0.235  # inches: the report's width, a sample's height, a line of the table
TABLE, CHARACTERS = 5.2, 70  # inches of the table; what fits beside one another in it
MOST_ROWS, MOST_PUBLISHED, MOST_NOTES, MOST_TYPES = 12, 6, 2, 8
INK, SOFT, RULE, BAR, GOOD, BAD, NOTE = "#1c1d1f", "#5d6168", "#d3d6da", "#3566a8", "#18764a", "#b3372c", "#8a4b00"
TONES = {"good": GOOD, "bad": BAD, "": BAR}


class Texts:
    """What stands above and below a sample's image."""

    def __init__(self, record: dict, task: str):
        self.question = brief(record.get("question", ""), 2)
        self.said = brief(record["prediction"] or "(nothing)", LINES, WRAP - 4)
        self.score, self.tone = score_text(record, task), tone(record, task)
        references = wanted(record, task)
        title = "wanted" if len(references) == 1 else f"wanted, 1 of {len(references)}"
        unbroken = references[0].replace(" ×", "\u00a0×") if references else ""  # a count stays with its answer
        self.wanted = brief(f"{title}: {unbroken}", 2) if references else ""


class Row:
    """A row of samples; `height` in inches, `below` of it for the texts below the images."""

    def __init__(self, title: str, records: list[tuple[dict, Texts]]):
        self.title, self.records = title, records
        above = max(inches(texts.question, texts.said) for _, texts in records)
        self.below = 0.15 + max(inches(texts.score, texts.wanted) for _, texts in records)
        self.height = (0.4 if title else 0.15) + above + PICTURE + self.below


def inches(*texts: str) -> float:
    """Total height of stacked texts."""
    return sum(0.08 + 0.17 * (text.count("\n") + 1) for text in texts if text)


def write_picture(
    output_dir: Path,
    summary: dict,
    records: list[dict],
    sections: dict[str, list[dict]],
    data: EvaluationSet,
    heat: list[tuple[str, Image.Image]],
    heat_name: str,
) -> Path:
    """Draw it; `sections` are records by their heading, `heat` starts with the mean over the queries."""
    task = summary["protocol"]["task"]
    rows = [
        Row(title if start == 0 else "", [(one, Texts(one, task)) for one in chosen[start : start + COLUMNS]])
        for title, chosen in sections.items()
        for start in range(0, len(chosen), COLUMNS)
    ]
    lines = table_lines(summary)
    top = max(3.6, LINE * (len(lines) + 1))
    figure = Figure(
        figsize=(WIDTH, 0.5 + top + sum(row.height for row in rows)), layout="constrained", facecolor="white"
    )
    figure.get_layout_engine().set(h_pad=0.09)
    figure.suptitle(brief(title_of(summary), 2, 95), fontsize=15, fontweight="bold", color=INK)
    parts = figure.subfigures(1 + len(rows), 1, height_ratios=[top, *[row.height for row in rows]], squeeze=False)[:, 0]
    left, middle, right = parts[0].subfigures(1, 3, width_ratios=[TABLE + 0.4, 4.9, 3.5])
    draw_table(left, lines, top)
    draw_scores(middle, summary, records)
    if heat:
        axis = right.subplots()
        axis.set_axis_off()
        axis.imshow(heat[0][1])
        axis.set_title(f"Where the queries look ({heat[0][0]})\n{brief(heat_name, 1)}", fontsize=10, color=INK)
    for part, row in zip(parts[1:], rows):
        draw_row(part, row, data)
    target = output_dir / "report.png"
    figure.savefig(target, dpi=90)
    return target


def table_lines(summary: dict) -> list[tuple[str, list[str], str]]:
    """Lines of the table, each with text at the left, cells at the right, and its kind: head, ours, other or note."""
    heads, rows = figure_table(summary)
    lines = [("", heads, "head")] if rows else []
    lines += [(name, cells, "ours") for name, cells in rows[:MOST_ROWS]]
    lines += more(len(rows) - MOST_ROWS)
    published = published_figures(summary)
    if published:
        lines += [("", [], "other"), ("published", [], "head")]
    for model, figures in list(published.items())[:MOST_PUBLISHED]:
        values = [f"{label(name)}  {shown(value)}" for name, value in figures.items()]
        names = textwrap.wrap(model, CHARACTERS - max(map(len, values)))
        for number in range(max(len(names), len(values))):
            cells = values[number : number + 1]
            lines.append((names[number] if number < len(names) else "", cells, "other"))
    lines += more(len(published) - MOST_PUBLISHED)
    for note in sorted_notes(summary["notes"])[:MOST_NOTES]:
        lines += [("", [], "other")] + [(line, [], "note") for line in textwrap.wrap(note, CHARACTERS, max_lines=5)]
    return lines


def more(count: int) -> list[tuple[str, list[str], str]]:
    return [(f"and {count} more in report.html", [], "other")] if count > 0 else []


def draw_table(part, lines: list[tuple[str, list[str], str]], height: float) -> None:
    """Lines of text in inches: matplotlib's own table knows no wrapped names and no notes."""
    axis = part.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set(xlim=(-0.25, TABLE + 0.15), ylim=(height, 0))
    columns = max(len(cells) for _, cells, _ in lines) if lines else 1
    step = min(1.3, (TABLE - 2.2) / max(1, columns - 1))  # inches between columns, so that names have theirs
    for number, (name, cells, kind) in enumerate(lines):
        y = LINE * (number + 0.5)
        colour = {"head": SOFT, "note": NOTE}.get(kind, INK)
        axis.text(0, y, plain(name), fontsize=9.5, color=colour, va="center")
        for column, cell in enumerate(cells):
            x = TABLE - step * (len(cells) - 1 - column)
            weight = "bold" if column == 0 and kind == "ours" else "normal"
            axis.text(x, y, plain(cell), fontsize=9.5, color=colour, va="center", ha="right", fontweight=weight)
        if kind == "head":
            axis.plot([0, TABLE], [y + LINE / 2] * 2, color=RULE, linewidth=1)
        if kind == "note":
            axis.plot([-0.1, -0.1], [y - LINE / 2, y + LINE / 2], color=NOTE, linewidth=3, solid_capstyle="butt")


def draw_scores(part, summary: dict, records: list[dict]) -> None:
    """How often each score came; below it the score of each type of question or answer, where there are types."""
    bars = score_bars(records, summary["protocol"]["task"])
    if bars is None:
        return
    types = list(type_bars(summary["metrics"], records).items())[:1]
    axes = part.subplots(1 + len(types), 1, squeeze=False)[:, 0]
    axis = axes[0]
    drawn = axis.bar([n + 0.5 for n in range(len(bars.counts))], bars.counts, width=0.9)
    for bar, colour in zip(drawn, bars.tones):
        bar.set_color(TONES[colour])
    axis.bar_label(drawn, [count or "" for count in bars.counts], fontsize=8, color=SOFT)
    axis.set_title(bars.title, fontsize=10, color=INK)
    axis.set_xticks([place for place, _ in bars.ticks], [text for _, text in bars.ticks])
    beside = max(0.1, (3 - len(bars.counts)) / 2)  # keeps two bars as narrow as three
    axis.set_xlim(-beside, len(bars.counts) + beside)
    axis.set_ylabel(bars.up, fontsize=9, color=SOFT)
    axis.set_xlabel("\n".join(filter(None, [bars.across, brief(bars.note, LINES, 64)])), fontsize=8.5, color=SOFT)
    clean(axis)
    axis.set_yticks([])
    for axis, (kind, found) in zip(axes[1:], types):
        names = [f"{brief(name, 1, 22)} ({count})" for name, _, count in found[:MOST_TYPES]]
        drawn = axis.barh(names, [value for _, value, _ in found[:MOST_TYPES]], color=BAR, height=0.7)
        axis.bar_label(drawn, [shown(value) for _, value, _ in found[:MOST_TYPES]], fontsize=8, color=SOFT, padding=2)
        kept = f", the {MOST_TYPES} most frequent of {len(found)}" if len(found) > MOST_TYPES else ""
        axis.set_title(f"{label(summary['main_metric'])} by {label(kind)} (answers){kept}", fontsize=10, color=INK)
        axis.set_xlim(0, 110)
        axis.invert_yaxis()
        clean(axis)
        axis.set_xticks([])


def clean(axis) -> None:
    axis.tick_params(labelsize=8, colors=SOFT, length=0)
    for side in ("top", "left", "right"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(RULE)


def draw_row(part, row: Row, data: EvaluationSet) -> None:
    """The heading over up to four images, each with its texts. Places are fixed, so that a single image is as large as in a full row."""
    part.text(0.01, 1 - 0.12 / row.height, plain(row.title), fontsize=12, fontweight="bold", color=INK, va="center")
    for column, (record, texts) in enumerate(row.records):
        axis = part.add_axes(((column + 0.05) / COLUMNS, row.below / row.height, 0.9 / COLUMNS, PICTURE / row.height))
        image = data.image_of(record["number"])
        image.thumbnail((420, 420))
        axis.imshow(image)
        axis.set_axis_off()
        lines = texts.said.count("\n") + 1
        write_beside(axis, texts.said, 1, 5, fontsize=9.5, fontweight="bold", color=INK)
        write_beside(axis, texts.question, 1, 8 + 13.5 * lines, fontsize=8.5, color=SOFT)
        write_beside(axis, texts.score, 0, 4, fontsize=8.5, color=TONES[texts.tone] if texts.tone else INK)
        write_beside(axis, texts.wanted, 0, 18 if texts.score else 4, fontsize=8.5, color=SOFT)


def write_beside(axis, text: str, side: int, points: float, **style) -> None:
    """Text above (side 1) or below (side 0) an image, `points` away from it."""
    place = {"textcoords": "offset points", "ha": "center", "va": "bottom" if side else "top"}
    axis.annotate(text, (0.5, side), (0, points if side else -points), "axes fraction", **place, **style)


def brief(text: str, lines: int, width: int = WRAP) -> str:
    return plain("\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" ...")))


def plain(text: str) -> str:
    """$ would start a formula."""
    return text.replace("$", r"\$")
