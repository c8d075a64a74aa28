"""Recall at K and median rank of image-text retrieval, both ways, with several texts an image."""

import numpy as np
from numpy.typing import ArrayLike

BLOCK = 256  # rows compared at once: keeps the comparison of 5000 x 25000 scores within a few MB


def retrieval_recall(scores: ArrayLike, text_to_image: ArrayLike, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """`i2t_rK` and `t2i_rK` in percent, `i2t_median_rank` and `t2i_median_rank` (1 is best).

    `scores` (N, M): of N images with M texts, higher is better. `text_to_image` (M,): the image of each text. A wrong
    candidate with the same score as the right one counts as ranked before it, so that a constant score earns nothing.
    Image-to-text takes the best-ranked of an image's texts; an image without a text is a candidate but no query.
    Raises ValueError when shapes do not fit, for images that are not there, and for NaN among the scores.
    """
    image_ranks, text_ranks = ranks(scores, text_to_image)
    return recalls(image_ranks, text_ranks, ks) | {
        "i2t_median_rank": float(np.median(image_ranks)),
        "t2i_median_rank": float(np.median(text_ranks)),
    }


def recall_at_k(scores: ArrayLike, text_to_image: ArrayLike, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """The recalls of `retrieval_recall` alone."""
    return recalls(*ranks(scores, text_to_image), ks)


def recalls(image_ranks: np.ndarray, text_ranks: np.ndarray, ks: tuple[int, ...]) -> dict[str, float]:
    named = (("i2t", image_ranks), ("t2i", text_ranks))
    return {f"{way}_r{k}": 100 * float(np.mean(found <= k)) for k in ks for way, found in named}


def ranks(scores: ArrayLike, text_to_image: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Rank of the best right text of each image that has one, and of each text's image among all; 1 is best."""
    scores, owner = np.asarray(scores), np.asarray(text_to_image)
    if scores.ndim != 2 or owner.shape != scores.shape[1:] or 0 in scores.shape:
        raise ValueError(
            f"scores have shape {scores.shape} and text_to_image {owner.shape}; they must be (images, texts) and (texts,)."
        )
    number_of_images, number_of_texts = scores.shape
    if owner.dtype.kind not in "iu" or owner.min() < 0 or owner.max() >= number_of_images:
        raise ValueError(
            f"text_to_image must hold integers from 0 to {number_of_images - 1}, the rows of scores; "
            f"it holds {owner.dtype} from {owner.min()} to {owner.max()}."
        )
    if any(np.isnan(scores[start : start + BLOCK]).any() for start in range(0, number_of_images, BLOCK)):
        raise ValueError("There is NaN among the scores: it cannot be ranked.")
    right = scores[owner, np.arange(number_of_texts)]  # (M,)
    best = np.full(number_of_images, -np.inf)
    np.maximum.at(best, owner, right)
    image_ranks = np.empty(number_of_images, dtype=np.int64)
    text_ranks = np.zeros(number_of_texts, dtype=np.int64)
    for start in range(0, number_of_images, BLOCK):
        block = scores[start : start + BLOCK]
        image_ranks[start : start + BLOCK] = (block >= best[start : start + BLOCK, None]).sum(axis=1)
        text_ranks += (block >= right).sum(axis=0)  # counts the right image itself, so ranks start at 1
    right_at_best = np.bincount(owner, weights=right >= best[owner], minlength=number_of_images).astype(np.int64)
    image_ranks += 1 - right_at_best  # an image's own texts do not stand in one another's way
    return image_ranks[np.bincount(owner, minlength=number_of_images) > 0], text_ranks
