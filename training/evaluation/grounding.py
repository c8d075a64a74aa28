"""Whether what is written depends on the image: a fluent language model scores well without having looked."""

from collections import Counter
from collections.abc import Hashable, Sequence

from ..metrics.caption.scores import caption_scores

FEWEST = 8  # rows: with fewer, differences are luck


def others(images: Sequence[Hashable]) -> list[int] | None:
    """For each row the number of another with another image, each taken once; None where one image has more than half.

    Always the same: rows in the order of their images, each with the one half a round on.
    """
    count = len(images)
    most = max(Counter(images).values(), default=0)
    if 2 * most > count:
        return None
    ordered = sorted(range(count), key=lambda row: str(images[row]))
    shift = max(most, count // 2)
    partner = [0] * count
    for place, row in enumerate(ordered):
        partner[row] = ordered[(place + shift) % count]
    return partner


def variety(texts: list[str]) -> dict[str, float]:
    """`unique_texts`, how many texts are unlike all others before them, and the share of the commonest in percent."""
    counts = Counter(texts)
    return {"unique_texts": len(counts), "commonest_text": 100 * max(counts.values()) / len(texts)} if texts else {}


def caption_grounding(texts: list[str], references: list[list[str]], images: Sequence[Hashable]) -> dict[str, float]:
    """`variety`, and CIDEr (1 is 100 %) of the texts for other images.

    It needs no other texts: what is written for row b's image with row a's references is b's own text.
    """
    figures, partner = variety(texts), others(images)
    if partner is not None and len(texts) >= FEWEST:
        exchanged = [texts[row] for row in partner]
        figures["cider_other_images"] = caption_scores(exchanged, references)["CIDEr"]
    return figures
