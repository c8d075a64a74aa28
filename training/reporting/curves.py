"""curves.png in the folder of a run: losses, learning rate and validation over the steps."""

import json
from pathlib import Path

from ..system.atomic_files import whole_file

PER_COLUMN = 2
MOST_POINTS = (
    2000  # of training that a curve is drawn through: a picture shows no more, and a long run has 250 000 lines
)


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draw the lines of metrics.jsonl: a panel each for the losses, validation losses, learning rate, other figures."""
    lines = [json.loads(line) for line in lines_to_draw(metrics.read_bytes().splitlines())]
    panels = [panel for panel in choose_panels(lines) if panel[1]]
    if not panels:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: it would keep every figure and look for a screen

    rows = -(-len(panels) // PER_COLUMN)
    figure = Figure(figsize=(6.4 * min(PER_COLUMN, len(panels)), 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (title, names) in enumerate(panels):
        axes = figure.add_subplot(rows, min(PER_COLUMN, len(panels)), number + 1)
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            steps, values = zip(*points)
            axes.plot(steps, values, label=name, marker="o" if len(points) < 30 else None, markersize=3, linewidth=1.2)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=1 + len(names) // 5)
    with whole_file(picture) as file:
        figure.savefig(file, format="png", dpi=110)


def choose_panels(lines: list[dict]) -> list[tuple[str, list[str]]]:
    """(title, names of figures); what has no line has no place."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    losses = [name for name in names if name.startswith("loss")]
    evaluated = [name for name in names if name.startswith("eval_loss")]
    recalls = [name for name in names if name.startswith(("i2t_", "t2i_")) and name.count("_") == 1]
    shares = [
        name
        for name in names
        if "accuracy" in name or name in ("query_similarity", "temperature", "eval_temperature", "eval_token_accuracy")
    ]
    return [
        ("training losses", losses),
        ("validation losses", evaluated),
        ("retrieval by ITC, percent", recalls),
        ("accuracies, query similarity, temperature", shares),
        ("captions: CIDEr with own and with other images", [name for name in names if name.startswith("eval_cider")]),
        ("worth of the image, nats a token", [name for name in names if name == "eval_image_worth"]),
        ("learning rate", [name for name in names if name == "lr"]),
        ("gradient norm", [name for name in names if name == "grad_norm"]),
    ]


def lines_to_draw(lines: list[bytes]) -> list[bytes]:
    """All lines of validations, and of training evenly MOST_POINTS at most, the last one among them; none is read for it."""
    of_training = [number for number, line in enumerate(lines) if b'"lr":' in line]
    left_out = set(of_training) - set(of_training[:: -max(1, -(-len(of_training) // MOST_POINTS))])
    return [line for number, line in enumerate(lines) if number not in left_out]
