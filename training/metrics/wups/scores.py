"""WUPS: accuracy of answers that are sets of words, where a word of nearly the same meaning counts for nearly as much.

Malinowski and Fritz 2014 (arXiv 1410.0210), equal to their calculate_wups.py for DAQUAR. An answer is a list of items
separated by commas. An item is worth, in the other answer's set, the similarity to the item there most like it; an answer
is worth the smaller of the two products, of its items in the reference and of the reference's items in it.
"""

import math
from collections.abc import Callable
from pathlib import Path

from .wordnet import WordNet, find_wordnet, load_wordnet

THRESHOLDS = (0.9, 0.0)
BELOW_THRESHOLD = 0.1  # factor on similarities below the threshold


def wups(
    predictions: list[str], references: list[str] | list[list[str]], wordnet: str | Path | None = None
) -> dict[str, float]:
    """`wups_0.9`, `wups_0.0` and `accuracy` (items must be equal) in percent, means over questions.

    `references`: one answer a question, or several, over which a question's score is the mean (the "average consensus" of
    DAQUAR-Consensus). Words of an item are joined by _. `wordnet`: folder of WordNet 3.0's database files, looked for by
    `find_wordnet` when None.
    Raises FileNotFoundError without WordNet and ValueError when the lists do not fit each other.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions, but {len(references)} references: give one each.")
    if not len(predictions):
        raise ValueError("There are no predictions to score.")
    database = load_wordnet(find_wordnet(wordnet))
    measures = {f"wups_{threshold}": item_similarity(database, threshold) for threshold in THRESHOLDS}
    measures["accuracy"] = lambda first, second: float(first == second)
    totals = dict.fromkeys(measures, 0.0)
    for number, (prediction, answers) in enumerate(zip(predictions, references)):
        answers = [answers] if isinstance(answers, str) else answers
        if not len(answers):
            raise ValueError(f"Question {number} has no reference answer.")
        for name, measure in measures.items():
            totals[name] += sum(answer_score(prediction, answer, measure) for answer in answers) / len(answers)
    return {name: 100 * total / len(predictions) for name, total in totals.items()}


def answer_score(prediction: str, answer: str, measure: Callable[[str, str], float]) -> float:
    """Score of one answer, 0 to 1, by a measure between items."""
    given, wanted = items(prediction), items(answer)
    return min(
        math.prod(max(measure(item, other) for other in wanted) for item in given),
        math.prod(max(measure(item, other) for other in given) for item in wanted),
    )


def items(answer: str) -> list[str]:
    return [item.strip() for item in answer.split(",")]


def item_similarity(database: WordNet, threshold: float) -> Callable[[str, str], float]:
    """Measure between items: 1 if equal, else the similarity of their closest senses, a tenth of it below the threshold."""

    def similarity(first: str, second: str) -> float:
        if first == second:
            return 1.0
        closest = max(
            (
                database.wup_similarity(sense, other)
                for sense in database.synsets(first)
                for other in database.synsets(second)
            ),
            default=0.0,
        )
        return closest if closest >= threshold else BELOW_THRESHOLD * closest

    return similarity
