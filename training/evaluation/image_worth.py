"""What the image is worth to the loss of a language model: by how much it rises with the images of other rows."""

from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import Dataset

from modeling_blip2x.language_blip2x import IGNORE

from ..data.collators import CausalLMCollator, Seq2SeqLMCollator
from .grounding import FEWEST, others
from .writing import SHARDED, share_work


@torch.no_grad()
def image_worth(
    accelerator: Accelerator,
    model: torch.nn.Module,
    dataset: Dataset,
    collator: CausalLMCollator | Seq2SeqLMCollator,
    images: Sequence[Hashable],
    batch_size: int,
) -> dict[str, float]:
    """What the image is worth to the first len(images) rows, in nats of loss a supervised token.

    image_worth: by how much the loss rises with the image of another row; image_worth_error, the standard error of that.
    Each row is compared with itself, so that what is easy or hard about its text cancels out. Empty where every process
    holds a part of the model, which then cannot run alone, and of fewer than FEWEST rows.
    """
    partner = others(images)
    if partner is None or len(images) < FEWEST or accelerator.distributed_type in SHARDED:
        return {}
    model.eval()

    def losses(rows: list[int]) -> list[tuple[float, float, int]]:
        items = [dataset[0, row] for row in rows]
        image = "vision_embeds" if "vision_embeds" in items[0] else "image"
        exchanged = [item | {image: dataset[0, partner[row]][image]} for row, item in zip(rows, items)]
        own, other = (row_losses(accelerator, model, collator(part)) for part in (items, exchanged))
        return [(a, b, tokens) for (a, tokens), (b, _) in zip(own, other)]

    found = torch.tensor(share_work(accelerator, len(images), batch_size, losses), dtype=torch.float64)
    own, other, tokens = found.unbind(1)
    worth = (other - own).sum() / tokens.sum()
    # Of a ratio of sums over rows (the linearised variance of a ratio estimator).
    error = ((other - own) - worth * tokens).square().sum().sqrt() / tokens.sum()
    return {"image_worth": worth.item(), "image_worth_error": error.item()}


def row_losses(accelerator: Accelerator, model: torch.nn.Module, batch: dict) -> list[tuple[float, int]]:
    """Summed loss and number of supervised tokens of each row of a batch."""
    batch = send_to_device(batch, accelerator.device)
    with accelerator.autocast():
        logits = model(**batch).logits
    labels = batch["labels"]
    if not model.config.is_encoder_decoder:  # a position predicts the next token
        labels, logits = labels[:, 1:], logits[:, -labels.shape[1] : -1]
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
    return list(zip(losses.sum(dim=1).tolist(), (labels != IGNORE).sum(dim=1).tolist()))
