"""The figures of an evaluation as a report writes them: names, numbers, and which stand side by side."""

from pathlib import Path

DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}
NAMES = {
    "itc_score": "ITC score",
    "itc_score_references": "ITC score of the references",
    "vqa_accuracy": "VQA accuracy",
    "ROUGE_L": "ROUGE-L",
    "CIDEr_other_images": "CIDEr, images exchanged",
    "unique_texts": "different texts",
    "commonest_text": "the commonest text, percent",
    "image_worth": "worth of the image, nats",
    "image_worth_error": "its standard error",
    "top1": "top 1",
    "top5": "top 5",
}


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if abs(value) >= 1 else f"{value:.2f}"


def label(name: str) -> str:
    """A metric's name for readers."""
    way, _, rest = name.partition("_")
    if way in DIRECTIONS:
        return f"{DIRECTIONS[way]}, " + (f"R@{rest[1:]}" if rest.startswith("r") else rest.replace("_", " "))
    return NAMES.get(name, name.replace("_", " "))


def overall(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that are not of a type of questions or answers."""
    return {name: value for name, value in metrics.items() if "/" not in name}


def figure_table(summary: dict) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Heads of the columns, and rows of a name and cells. What is measured in several ways has a column each: retrieval
    re-ranked and by ITC alone, captions over all images and by NoCaps' domains."""
    plain, protocol = overall(summary["metrics"]), summary["protocol"]
    first = "i2t_r1" if protocol["task"] == "retrieval" else "Bleu_4"
    endings = [name.removeprefix(first) for name in plain if name.startswith(f"{first}_")]
    if protocol["task"] == "retrieval":
        mode = protocol["score_mode"]
        heads = ["ITC"] if mode == "itc" else [f"re-ranked ({mode})", "ITC alone"]
    else:
        heads = ["overall", *[ending[1:] for ending in endings]] if endings else ["this evaluation"]
    rows = [
        (label(name), [shown(value), *[shown(plain.get(name + ending)) for ending in endings]])
        for name, value in plain.items()
        if not any(name.endswith(ending) for ending in endings)
    ]
    return heads, rows


def published_figures(summary: dict) -> dict[str, dict[str, float]]:
    """Of each published model, the figures that this evaluation has too."""
    names = overall(summary["metrics"])
    found = {
        model: {name: figures[name] for name in names if name in figures}
        for model, figures in summary["published"].items()
    }
    return {model: figures for model, figures in found.items() if figures}


def sorted_notes(notes: list[str]) -> list[str]:
    """Notes on comparing with published figures come first, so that readers of the table do not miss them."""
    return sorted(notes, key=lambda note: "comparable" not in note)


TITLES = {"caption": "Captions", "vqa": "Answers", "retrieval": "Retrieval", "classification": "Classes"}


def title_of(summary: dict) -> str:
    protocol = summary["protocol"]
    names = ", ".join(Path(part).name for part in protocol["data"].split(","))
    return f"{TITLES[protocol['task']]}: {summary['name']} on {names}, {protocol['split']}"
