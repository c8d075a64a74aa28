"""Table and picture of the embedded default."""

import json
from pathlib import Path

from .scenes import QUESTION_TYPES

SPLITS = {"test_new": "new scenes", "test_held_out": "held-out combinations"}
AIMS = {
    "caption": ("caption exact match", 0.95, 0.75),
    "vqa": ("VQA accuracy", 0.90, 0.85),
    "itc": ("retrieval R@1, ITC", 0.85, 0.70),
    "itm": ("retrieval R@1, re-ranked by ITM", 0.92, 0.88),
}
MARGIN = 0.15  # margin by which each question type must beat the blind row


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Lines of figures for {"full" or an ablation's name: {split: scores}}."""
    full = results["full"]
    lines = [f"{'':<36}{'new scenes':>14}{'held-out':>14}   aims"]

    def line(label: str, values: list, aims: str = "") -> None:
        cells = [f"{value:.3f}" if value is not None else "-" for value in values]
        lines.append(f"{label:<36}{cells[0]:>14}{cells[1]:>14}   {aims}".rstrip())

    for key, (label, *aims) in AIMS.items():
        line(label, [full[split].get(key) for split in SPLITS], " / ".join(f"{aim:.2f}" for aim in aims))
        if key == "vqa":
            line("  blind (noise for the image)", [full[split]["blind"] for split in SPLITS])
            for kind in QUESTION_TYPES:
                line(f"  {kind}", [full[split].get(f"vqa_{kind}") for split in SPLITS])
                line("    blind", [full[split].get(f"blind_{kind}") for split in SPLITS], f"{MARGIN} below")
    for name in results:
        if name != "full":
            lines.append(name)
            for key, (label, *_) in AIMS.items():
                if any(key in results[name][split] for split in SPLITS):
                    line(f"  {label}", [results[name][split].get(key) for split in SPLITS])
    missed = misses(full)
    lines.append("All aims are met." if not missed else "Missed: " + "; ".join(missed) + ".")
    return "\n".join(lines)


def misses(full: dict[str, dict[str, float]]) -> list[str]:
    """The aims that are not met, in words."""
    missed = []
    for index, (split, name) in enumerate(SPLITS.items()):
        scores = full[split]
        for key, (label, *aims) in AIMS.items():
            if scores[key] < aims[index]:
                missed.append(f"{label}, {name}: {scores[key]:.3f} < {aims[index]:.2f}")
        for kind in QUESTION_TYPES:
            gain = scores.get(f"vqa_{kind}", 1.0) - scores.get(f"blind_{kind}", 0.0)
            if gain < MARGIN:
                missed.append(f"{kind} questions, {name}: only {gain:.3f} above blind")
    return missed


def write_picture(output_dir: Path, shown: list[dict], curves: dict[str, Path]) -> Path:
    """report.png: scenes with caption and answers, and the loss of each part.

    shown: {"image": path, "caption": str, "true_caption": str, "answers": [[question, answer, true answer], ...]} each.
    curves: title of each part and its metrics.jsonl.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(16, 14), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[5, 2])
    top.suptitle("Scenes with colour-shape pairs that stages 1 and 2 never saw (toy models, made on the spot)")
    for axis, item in zip(top.subplots(2, 4).flat, shown):
        axis.imshow(plt.imread(item["image"]))
        axis.set_axis_off()
        marks = [f"{q} {a}{'' if a == truth else f' (wrong: {truth})'}" for q, a, truth in item["answers"]]
        wrong = "" if item["caption"] == item["true_caption"] else f"\n(wrong: {item['true_caption']})"
        axis.set_title("\n".join([item["caption"] + wrong, *marks]), fontsize=8)
    for axis, (title, path) in zip(bottom.subplots(1, len(curves)), curves.items()):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for part in [name for name in lines[0] if name.startswith("loss")]:
            points = [(line["step"], line[part]) for line in lines if part in line]
            axis.plot(*zip(*points), label=part, linewidth=1)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.legend(fontsize=8)
    target = output_dir / "report.png"
    figure.savefig(target, dpi=100)
    plt.close(figure)
    return target
