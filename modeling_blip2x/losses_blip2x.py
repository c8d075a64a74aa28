"""The three objectives of stage 1 as pure functions (paper, section 3.2), the draw of hard negatives, and what keeps queries
apart.

Shapes: B pairs on this process, N pairs in the global batch (N = B without a process group), Q queries, P width of the
contrastive space. All losses are computed in fp32 and are means over the global batch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .distributed_blip2x import global_mean, share_of_items

LABEL_SMOOTHING = 0.1  # ITC and ITG; figure of the official implementation
QUERY_DISTANCE = 0.9  # of unit vectors whose cosine is .6


def image_text_similarity(image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
    """Cosines (images, texts) of unit-norm (images, Q, P) and (texts, P): the best query counts (section 3.2, ITC)."""
    # Autocast would round cosines to bfloat16: an error of 1/512, which is 0.03 in logits at temperature 0.07.
    with torch.autocast(image_features.device.type, enabled=False):
        return torch.einsum("iqp,tp->itq", image_features.float(), text_features.float()).amax(dim=-1)


def positive_pairs(local_ids: torch.Tensor, global_ids: torch.Tensor) -> torch.Tensor:
    """Boolean (B, N): pairs with equal image ids belong together."""
    return local_ids[:, None] == global_ids[None, :]


def itc_loss(logits_per_image: torch.Tensor, logits_per_text: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Image-text contrastive loss, the mean of both directions.

    logits_per_image, logits_per_text (B, N): cosine / temperature of this process's images (texts) with all texts
    (images). positives (B, N): the target mass of a row is spread over them evenly, then smoothed over all N.
    """
    targets = positives.float() / positives.sum(dim=1, keepdim=True)
    targets = (1 - LABEL_SMOOTHING) * targets + LABEL_SMOOTHING / targets.shape[1]
    image_side = -(targets * F.log_softmax(logits_per_image.float(), dim=1)).sum()
    text_side = -(targets * F.log_softmax(logits_per_text.float(), dim=1)).sum()
    return global_mean((image_side + text_side) / 2, len(targets))


def sigmoid_itc_loss(logits_per_image: torch.Tensor, positives: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """ITC by a sigmoid for each pair (Zhai et al. 2023, SigLIP, equation 1): is this the text of that image, yes or no?

    logits_per_image (B, N): cosine / temperature of this process's images with all texts: every pair of the global batch
    is on one process. positives (B, N). bias (1,): learned; it starts low, as most pairs are negatives. Terms are summed
    over the texts and averaged over the images.
    """
    signs = torch.where(positives, 1.0, -1.0)
    total = -F.logsigmoid(signs * (logits_per_image.float() + bias.float())).sum()
    return global_mean(total, len(positives))


def draw_hard_negatives(logits: torch.Tensor, positives: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One non-positive column per row, drawn with probability softmax(logits) over these columns (section 3.2, ITM).

    logits, positives (B, N); uniform (B,) in [0, 1), one number a row. Returns (B,) column numbers, -1 where a row has
    no negative at all. Inverse transform sampling: the draw of a row depends on nothing but its logits and its number.
    """
    # float64: in a cumulative sum of float32 the smallest weights of a large batch are rounded away.
    weights = logits.detach().double().masked_fill(positives, -torch.inf).softmax(dim=1)  # NaN: no negative in the row
    cumulative = weights.cumsum(dim=1)
    threshold = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    # right=True passes over columns of weight 0, the positives, also at a uniform number of 0; clamp: rounding may put the
    # threshold at the very end.
    column = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    has_negative = ~positives.all(dim=1)
    return torch.where(has_negative, column, -1)


def uniform_numbers(first_row: int, rows: int, seed: int | None, device: torch.device) -> torch.Tensor:
    """(rows, 2) numbers in [0, 1) for rows first_row.. of the global batch.

    With a seed the numbers of a row depend on the seed and its number in the global batch only, whatever the number of
    processes. Without one they come from torch's own generator.
    """
    if seed is None:
        return torch.rand(rows, 2, device=device)
    # On the CPU, as a GPU draws other numbers from the same seed. Those of earlier rows are drawn too, and dropped: row i
    # then gets the same number on any rank.
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(first_row + rows, 2, generator=generator)[first_row:].to(device)


@dataclass
class ItmPairs:
    """Pairs for ITM: columns of the global batch, positives first. labels: 1 for a match, 0 for none; all (pairs,)."""

    image_index: torch.Tensor
    text_index: torch.Tensor
    labels: torch.Tensor


def itm_pairs(own: torch.Tensor, negative_image: torch.Tensor, negative_text: torch.Tensor) -> ItmPairs:
    """The B matching pairs, each text with a hard negative image, each image with a hard negative text.

    own (B,): global row numbers of this process. negative_image, negative_text (B,): -1 where there is none.
    """
    # A pair without a negative is left out, not replaced: a random or repeated one would be a false label.
    with_image, with_text = negative_image >= 0, negative_text >= 0
    image_index = torch.cat([own, negative_image[with_image], own[with_text]])
    text_index = torch.cat([own, own[with_image], negative_text[with_text]])
    labels = torch.zeros_like(image_index)
    labels[: len(own)] = 1
    return ItmPairs(image_index, text_index, labels)


def itm_loss(itm_logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Image-text matching: cross-entropy and accuracy of itm_logits (pairs, 2), order (no match, match)."""
    loss, correct = itm_sums(itm_logits, labels)
    return global_mean(loss, len(labels)), global_mean(correct, len(labels)).detach()


def itm_sums(itm_logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy, and how many are right, of the pairs given: the terms of `itm_loss` before their mean."""
    itm_logits = itm_logits.float()
    correct = (itm_logits.argmax(dim=-1) == labels).float().sum()
    return F.cross_entropy(itm_logits, labels, reduction="sum"), correct


def itg_loss(
    token_logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Image-grounded text generation: mean over the tokens of the global batch, smoothed (section 3.2, ITG).

    token_logits (tokens, vocabulary) and labels (tokens,): predicted positions only, padding already left out.
    num_items_in_batch: tokens as a trainer has counted them; the loss is then what these tokens add to the mean over all.
    """
    total = itg_sum(token_logits, labels)
    if num_items_in_batch is not None:
        return share_of_items(total, num_items_in_batch)
    return global_mean(total, len(labels))


def itg_sum(token_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed terms of `itg_loss` of the tokens given, before their mean."""
    return F.cross_entropy(token_logits.float(), labels, reduction="sum", label_smoothing=LABEL_SMOOTHING)


def query_spread_loss(queries: torch.Tensor) -> torch.Tensor:
    """How far the query outputs of an image lie within QUERY_DISTANCE of one another: mean over pairs of queries and images.

    queries (B, Q, H). Ours, not the paper's: where queries start close together, as under a sentence encoder, training
    makes one vector of them within tens of steps, and nothing in the three objectives takes them apart again
    (docs/photos.md). A hinge on the distance of unit vectors, not on their cosine: the gradient of a cosine vanishes as two
    become one, that of the distance does not. Pairs that are further apart cost nothing. 0 for a single query.
    """
    return global_mean(query_spread_sum(queries), len(queries))


def query_spread_sum(queries: torch.Tensor) -> torch.Tensor:
    """Summed terms of `query_spread_loss` of the images given, before their mean."""
    count = queries.shape[1]
    if count == 1:
        return queries.new_zeros((), dtype=torch.float32)
    first, second = torch.triu_indices(count, count, offset=1, device=queries.device)
    unit = F.normalize(queries.float(), dim=-1)
    distances = (unit[:, first] - unit[:, second]).norm(dim=-1)
    return F.relu(QUERY_DISTANCE - distances).mean(dim=1).sum()
