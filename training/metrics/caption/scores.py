"""BLEU-1 to 4, ROUGE-L and CIDEr-D of captions, equal to the official COCO caption scorer, without Java.

The definitions are those of Papineni et al. 2002, Lin 2004 and Vedantam et al. 2015 (arXiv 1411.5726), with the choices of
the COCO scorer where the papers leave one: they are noted at each function. All scores are fractions, CIDEr goes to 10.
"""

import math
import warnings
from collections import Counter

import numpy as np

from .ptb import tokenize

ORDERS = 4  # n-grams of 1 to 4 words
ROUGE_BETA = 1.2  # recall weighs more than precision
CIDER_SIGMA = 6.0  # of the Gaussian penalty on a difference in length


def caption_scores(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """Scores of a corpus: Bleu_1 to Bleu_4, ROUGE_L and CIDEr.

    `predictions`: one caption an image; `references`: one or more captions of each image, as many lists as predictions.
    BLEU is that of the corpus (summed counts); ROUGE-L and CIDEr are means over images. CIDEr weighs n-grams by how few
    images of this corpus have them in a reference, so it depends on all references, and is 0 for a single image.
    Raises ValueError when the two lists do not fit each other.
    """
    predicted, referred = tokenized(predictions, references)
    per_image = bleu_counts(predicted, referred)
    return {
        **{f"Bleu_{n}": float(score) for n, score in enumerate(bleu(per_image.sum(axis=0, keepdims=True))[0], 1)},
        "ROUGE_L": float(np.mean([rouge_l(words, others) for words, others in zip(predicted, referred)])),
        "CIDEr": float(np.mean(cider_d(predicted, referred))),
    }


def caption_scores_per_image(predictions: list[str], references: list[list[str]]) -> dict[str, list[float]]:
    """The same scores image by image, each a list as long as `predictions`.

    Document frequencies of CIDEr are still those of the whole corpus. The mean of BLEU over images is not the BLEU of the
    corpus.
    """
    predicted, referred = tokenized(predictions, references)
    bleus = bleu(bleu_counts(predicted, referred))
    return {
        **{f"Bleu_{n + 1}": bleus[:, n].tolist() for n in range(ORDERS)},
        "ROUGE_L": [rouge_l(words, others) for words, others in zip(predicted, referred)],
        "CIDEr": cider_d(predicted, referred),
    }


def tokenized(predictions: list[str], references: list[list[str]]) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Words of all captions. Raises ValueError where predictions and references do not fit each other."""
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions, but references of {len(references)} images: give one list each."
        )
    if not len(predictions):
        raise ValueError("There are no predictions to score.")
    for number, captions in enumerate(references):
        if isinstance(captions, str) or not len(captions):
            raise ValueError(
                f"References of image {number} are {captions!r}; they must be a list of one or more captions."
            )
    return [tokenize(text) for text in predictions], [[tokenize(text) for text in texts] for texts in references]


def ngrams(words: list[str], n: int) -> Counter:
    return Counter(zip(*(words[start:] for start in range(n))))


def bleu_counts(predicted: list[list[str]], referred: list[list[list[str]]]) -> np.ndarray:
    """What BLEU adds up, (images, 2 + 2 * ORDERS): lengths of prediction and reference; matching n-grams; all n-grams.

    The reference length is that of the reference closest in length to the prediction, the shorter of two as close. An
    n-gram matches as often as the reference that has it most.
    """
    rows = []
    for words, references in zip(predicted, referred):
        length = len(words)
        closest = min((abs(len(reference) - length), len(reference)) for reference in references)[1]
        matching, total = [], []
        for n in range(1, ORDERS + 1):
            most = Counter()
            for reference in references:
                most |= ngrams(reference, n)
            matching.append((ngrams(words, n) & most).total())
            total.append(max(0, length - n + 1))
        rows.append([length, closest, *matching, *total])
    return np.array(rows, dtype=np.float64)


def bleu(counts: np.ndarray) -> np.ndarray:
    """BLEU-1 to 4 (rows, ORDERS) of rows of counts: geometric mean of the precisions, times the brevity penalty.

    The COCO scorer keeps a zero precision from erasing the rest by adding 1e-15 above and 1e-9 below the line.
    """
    length, closest = counts[:, :1], counts[:, 1:2]
    matching, total = counts[:, 2 : 2 + ORDERS], counts[:, 2 + ORDERS :]
    precision_logs = np.log((matching + 1e-15) / (total + 1e-9))
    means = np.cumsum(precision_logs, axis=1) / np.arange(1, ORDERS + 1)
    shortness = (closest + 1e-9) / (length + 1e-15)
    return np.exp(means + np.minimum(0, 1 - shortness))


def rouge_l(words: list[str], references: list[list[str]]) -> float:
    """F-measure of the longest common subsequence.

    As in the COCO scorer, precision and recall are each the best over references, even if of two different ones.
    """
    common = [common_subsequence(words, reference) for reference in references]
    precision = max(common) / max(len(words), 1)
    recall = max(length / max(len(reference), 1) for length, reference in zip(common, references))
    if precision == 0:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def common_subsequence(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence.

    A row of the usual table grows by 0 or 1 from column to column, so its steps fit into the bits of an integer, 0 for a
    step, and adding integers carries all columns on at once (Hyyrö 2004).
    """
    positions = {}
    for place, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << place
    everything = (1 << len(first)) - 1
    flat = everything
    for word in second:
        matched = flat & positions.get(word, 0)
        flat = (flat + matched) | (flat - matched)
    return len(first) - (flat & everything).bit_count()


def cider_d(predicted: list[list[str]], referred: list[list[list[str]]]) -> list[float]:
    """CIDEr-D of each image: 10 times the mean over n-gram lengths and references of a clipped cosine of tf-idf vectors.

    tf is the count of an n-gram in a caption; idf is log(images / images that have it in a reference), for n-grams of no
    reference log(images). Counts of the prediction are clipped to those of the reference, and a difference in length is
    penalised by exp(-difference^2 / (2 * 6^2)).
    """
    if len(predicted) == 1:
        warnings.warn(
            "CIDEr weighs words by how few images have them: with a single image it is 0. Score more images together.",
            stacklevel=3,
        )
    scores = np.zeros(len(predicted))
    for n in range(1, ORDERS + 1):
        reference_counts = [[ngrams(reference, n) for reference in references] for references in referred]
        frequency = Counter()
        for counts in reference_counts:
            frequency.update(set().union(*counts))
        most = math.log(len(predicted))
        idf = {ngram: most - math.log(count) for ngram, count in frequency.items()}
        for image, words in enumerate(predicted):
            vector = {ngram: count * idf.get(ngram, most) for ngram, count in ngrams(words, n).items()}
            length = norm(vector)
            for reference, counts in zip(referred[image], reference_counts[image]):
                other = {ngram: count * idf[ngram] for ngram, count in counts.items()}
                scale = length * norm(other)
                if scale == 0:
                    continue
                product = sum(
                    min(weight, other[ngram]) * other[ngram] for ngram, weight in vector.items() if ngram in other
                )
                difference = bigrams(words) - bigrams(reference)
                penalty = math.exp(-(difference**2) / (2 * CIDER_SIGMA**2))
                scores[image] += product / scale * penalty / len(referred[image])
    return (10 / ORDERS * scores).tolist()


def norm(vector: dict[tuple[str, ...], float]) -> float:
    return math.sqrt(sum(weight * weight for weight in vector.values()))


def bigrams(words: list[str]) -> int:
    """What the COCO scorer takes for the length of a caption."""
    return max(0, len(words) - 1)
