"""What a report shows of single predictions: which of them, and what it says about each."""

from collections import Counter
from pathlib import Path

import numpy as np

SHOWN, EXTREMES, REFERENCES = 8, 4, 5
RIGHT = {
    "vqa": "right answers",
    "retrieval": "images that find a text of their own first",
    "classification": "images in the right class",
}
WRONG = {
    "vqa": "wrong answers",
    "retrieval": "images that find a text of another image first",
    "classification": "images in a wrong class",
}


def state(record: dict, task: str) -> str:
    """`right`, `wrong`, or "" for what is neither: a caption, an answer that few people gave, and an image whose first text
    belongs to another image but is word for word one of its own, which the metric counts as a miss since it is a tie."""
    if task == "caption" or "score" not in record:
        return ""
    if record["score"] >= 100:
        return "right"
    if task == "retrieval":
        return "" if record["prediction"] in record["references"] else "wrong"
    return "wrong" if record["score"] == 0 else ""


def choose_records(records: list[dict], task: str) -> dict[str, list[dict]]:
    """Records to show by title: the best and worst, the first of equals, and evenly spread ones of the others."""
    scored = [record for record in records if "score" in record]
    count = min(EXTREMES, len(scored) // 3)
    best = sorted((one for one in scored if can_be_best(one, task)), key=lambda record: -round(record["score"], 6))
    best = of_different_images(best)[:count]
    taken = {record["number"] for record in best}
    worst = (one for one in scored if can_be_worst(one, task) and one["number"] not in taken)
    worst = of_different_images(sorted(worst, key=lambda record: round(record["score"], 6)))[:count]
    taken |= {record["number"] for record in worst}
    others = [record for record in records if record["number"] not in taken]
    spread = np.unique(np.linspace(0, len(others) - 1, min(SHOWN, len(others))).round().astype(int)) if others else []
    sections = {"Evenly spread": [others[number] for number in spread], "Best": best, "Worst": worst}
    return {title: chosen for title, chosen in sections.items() if chosen}


def can_be_best(record: dict, task: str) -> bool:
    return task == "caption" or state(record, task) == "right"


def can_be_worst(record: dict, task: str) -> bool:
    """Only what is wrong can be among the worst: not a caption that a person wrote too, whatever its CIDEr."""
    return record["prediction"] not in record["references"] if task == "caption" else state(record, task) == "wrong"


def of_different_images(records: list[dict]) -> list[dict]:
    """The first record of each image, in order."""
    first = {}
    for record in records:
        first.setdefault(record["image_id"], record)
    return list(first.values())


def heading(title: str, chosen: list[dict], records: list[dict], task: str) -> str:
    """The title with what the chosen records are taken from."""
    if title == "Evenly spread":
        return f"{title} over the data"
    if task == "caption":
        return f"{title}: the {'highest' if title == 'Best' else 'lowest'} CIDEr"
    wanted, named = ("right", RIGHT) if title == "Best" else ("wrong", WRONG)
    total = sum(state(record, task) == wanted for record in records)
    count = f"all {total}" if len(chosen) == total > 1 else f"{len(chosen)} of {total}"
    return f"{title}: {count} {named[task]}"


def score_text(record: dict, task: str) -> str:
    """The score of a record in words."""
    if "score" not in record:
        text = ""
    elif task == "caption":
        text = f"CIDEr {record['score']:.0f}"
    elif task == "retrieval":
        tied = record["rank"] > 1 and not state(record, task)
        text = f"own text at rank {record['rank']}" + (", tied: same words" if tied else "")
    else:
        text = state(record, task) or f"partly right: credit {record['score']:.0f} %"
    own = [f"ITC {record['itc_score']:.0f}"] if "itc_score" in record else []
    return ", ".join(filter(None, [text, *own]))


def tone(record: dict, task: str) -> str:
    """`good`, `bad` or none. A rank above 1 is no error by itself: of many alike texts another may fit as well."""
    found = state(record, task)
    return "good" if found == "right" else "bad" if found == "wrong" and task != "retrieval" else ""


def wanted(record: dict, task: str) -> list[str]:
    """The distinct references. Answers of many people are one line that counts them: no ×7, blue ×3."""
    counted = Counter(record["references"])
    if task == "vqa" and len(counted) < len(record["references"]):
        return [", ".join(f"{text} ×{count}" for text, count in counted.most_common())]
    return list(counted)


def image_label(record: dict, row: int) -> str:
    """A name for the image of a row: its file's, or where it has none its row's."""
    name = record["image"]
    return f"image of row {row}" if name in ("embedded bytes", "no name") else Path(name).name
