"""The bars of a report: how often each score came, and scores by type. The page and the picture both draw them."""

from collections import Counter
from dataclasses import dataclass

from .cases import state

RANKS = ((1, 1), (2, 2), (3, 3), (4, 5), (6, 10), (11, None))
MOST_BINS = 10
FEW = 6  # different scores that get a bar each; ten people's answers give 0, 30, 60, 90 or 100
UNITS = {"caption": "captions", "vqa": "answers", "retrieval": "images", "classification": "images"}


@dataclass
class Bars:
    """`counts` and `tones` (good, bad or none) have one for each bar; bar n reaches from n to n + 1, where `ticks` stand."""

    title: str
    across: str
    up: str
    counts: list[int]
    tones: list[str]
    ticks: list[tuple[float, str]]
    note: str = ""


def score_bars(records: list[dict], task: str) -> Bars | None:
    """How the scores of all records are spread; None without scores."""
    scored = [record for record in records if "score" in record]
    if not scored:
        return None
    if task == "retrieval":
        return rank_bars(scored)
    scores = [record["score"] for record in scored]
    if task == "caption":
        return caption_bars(scores)
    values = sorted(set(scores))
    if set(values) <= {0.0, 100.0}:
        right, wrong = scores.count(100.0), scores.count(0.0)
        title = f"Right {right}, wrong {wrong} of {len(scores)} {UNITS[task]}"
        return Bars(title, "", UNITS[task], [right, wrong], ["good", "bad"], [(0.5, "right"), (1.5, "wrong")])
    title, across = "Credit of the answers", "credit in percent: 100 where four people or more said so"
    if len(values) <= FEW:
        tones = ["bad" if value == 0 else "good" if value == 100 else "" for value in values]
        ticks = [(number + 0.5, f"{value:.0f}") for number, value in enumerate(values)]
        return Bars(title, across, UNITS[task], [scores.count(value) for value in values], tones, ticks)
    return binned(title, "credit, percent", UNITS[task], scores, 10.0, 10)


def rank_bars(scored: list[dict]) -> Bars:
    """Images by the rank of their best own text."""
    ranks = [record["rank"] for record in scored]
    counts = [sum(low <= rank and (high is None or rank <= high) for rank in ranks) for low, high in RANKS]
    labels = [f"{low}" if low == high else f"{low}-{high}" if high else f">{low - 1}" for low, high in RANKS]
    ties = sum(record["rank"] > 1 and not state(record, "retrieval") for record in scored)
    note = (
        f"{ties} of the {len(scored) - counts[0]} images beyond rank 1 are ties: the text they find first is another image's, but "
        "word for word one of their own. The metric counts ties as misses."
    )
    ticks = [(number + 0.5, label) for number, label in enumerate(labels)]
    tones = ["good"] + [""] * (len(RANKS) - 1)
    return Bars("Rank of an image's best own text", "rank", "images", counts, tones, ticks, note if ties else "")


def caption_bars(scores: list[float]) -> Bars:
    """Captions by their CIDEr, which reaches from 0 to 1000, in steps of a round width."""
    top = max(round(max(scores), 6), 10.0)  # rounding can take the highest above 1000, and into a bin of its own
    width = next(step for step in (1, 2, 5, 10, 20, 50, 100) if step * MOST_BINS >= top or step == 100)
    bins = max(1, -int(-top // width))
    return binned("CIDEr of the captions", "CIDEr of a caption", "captions", scores, float(width), bins)


def binned(title: str, across: str, up: str, scores: list[float], width: float, bins: int) -> Bars:
    """Equally wide bins from 0; what lies on the upper end is in the last one."""
    found = Counter(min(int(score // width), bins - 1) for score in scores)
    ticks = [(float(number), f"{number * width:.0f}") for number in range(bins + 1)]
    return Bars(title, across, up, [found[number] for number in range(bins)], [""] * bins, ticks)


def type_bars(metrics: dict[str, float], records: list[dict]) -> dict[str, list[tuple[str, float, int]]]:
    """By `question_type` and `answer_type`: each type's name, score and number of answers, the most frequent first."""
    groups: dict[str, list[tuple[str, float, int]]] = {}
    for name, value in metrics.items():
        kind, slash, one = name.partition("/")
        if slash:
            count = sum("score" in record and record["groups"].get(kind) == one for record in records)
            groups.setdefault(kind, []).append((one, value, count))
    return {kind: sorted(types, key=lambda one: -one[2]) for kind, types in groups.items()}
