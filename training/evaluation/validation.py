"""Validation of both stages: losses, image-text matching and retrieval; token accuracy."""

import math
from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from modeling_blip2x import Blip2xProcessor
from modeling_blip2x.language_blip2x import IGNORE

from ..data.caption_dataset import CaptionDataset, JointDataset, make_loader
from ..data.collators import CausalLMCollator, Seq2SeqLMCollator, Stage1Collator
from ..data.order import BatchOrder, EpochOrder
from ..metrics.retrieval_recall.scores import recall_at_k
from ..reporting.meter import measured
from .retrieval import RetrievalSet, rerank
from .writing import score_itg, score_language, share_work


def leave_out_unreadable(accelerator: Accelerator, dataset: CaptionDataset | JointDataset, batch_size: int) -> None:
    """Read every image of validation once, shared among processes, and take out those that cannot be read.

    All figures are then those of the data set without these rows.
    """

    def check(indices: list[int]) -> list[str | None]:
        return [dataset.fault(index) for index in indices]

    faults = share_work(accelerator, len(dataset), batch_size, check)
    bad = {index: fault for index, fault in enumerate(faults) if fault is not None}
    if bad:
        dataset.leave_out(bad)


def validate_image_text(
    accelerator: Accelerator,
    model: torch.nn.Module,
    dataset: CaptionDataset | None,
    collator: Stage1Collator,
    batch_size: int,
    rerank_k: int,
    samples: int,
    seed: int,
) -> dict[str, float]:
    """Stage 1 and retrieval: losses, R@K both ways, ITM accuracy, and R@K after ITM has re-ranked where rerank_k > 0;
    CIDEr and BLEU-4 of what the ITG head writes for the first `samples` images."""
    if dataset is None:
        return {}
    order = BatchOrder(
        EpochOrder(len(dataset), seed=0),
        batch_size,
        max(1, len(dataset) // (batch_size * accelerator.num_processes)),
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    batches = make_loader(dataset, order, collator, 0, accelerator.device.type == "cuda")
    figures = mean_losses(accelerator, model, batches, lambda batch: {"negative_seed": batch})
    if accelerator.is_main_process:  # no exchange with other processes from here on
        data = RetrievalSet(model, dataset, collator, accelerator)
        figures |= recall_at_k(data.cosines, data.owner)
        if "itm" in model.config.objectives:
            temperature = model.temperature.item()
            figures |= matching_accuracy(data, batch_size, temperature, seed)
            figures |= rerank(data, rerank_k, temperature) if rerank_k else {}
    accelerator.wait_for_everyone()
    if samples and "itg" in model.config.objectives:
        figures |= score_itg(accelerator, model, dataset, collator, batch_size, samples)
    return figures


def validate_language(
    accelerator: Accelerator,
    model: torch.nn.Module,
    processor: Blip2xProcessor,
    dataset: CaptionDataset | None,
    collator: CausalLMCollator | Seq2SeqLMCollator,
    batch_size: int,
    samples: int,
) -> dict[str, float]:
    """Stage 2 and its fine-tuning: loss and token accuracy over every row; what is written for the first `samples` rows."""
    if dataset is None:
        return {}
    rows = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    order = [[(0, row) for row in rows[start : start + batch_size]] for start in range(0, len(rows), batch_size)]
    own, most = len(order), math.ceil(len(range(0, len(dataset), accelerator.num_processes)) / batch_size)
    order += [[(0, 0)]] * (most - own)  # not counted: a sharded model needs as many forwards on every process
    batches = make_loader(dataset, order, collator, 0, accelerator.device.type == "cuda")
    figures = token_accuracy(accelerator, model, batches, own)
    if samples:
        figures |= score_language(accelerator, model, processor, dataset, collator, batch_size, samples)
    return figures


@torch.no_grad()
def mean_losses(
    accelerator: Accelerator, model: torch.nn.Module, batches: Iterable[dict], forward_inputs: Callable[[int], dict]
) -> dict[str, float]:
    """Means over batches of the losses and ITM accuracy, as eval_NAME.

    All processes call it with as many batches: the losses of stage 1 span processes.
    """
    model.eval()
    sums, count = {}, 0
    for number, batch in enumerate(batches):
        outputs = model(**send_to_device(batch, accelerator.device), **forward_inputs(number))
        for name, value in measured(outputs).items():
            sums[name] = sums.get(name, 0.0) + value
        count += 1
    return {f"eval_{name}": accelerator.reduce(total / count, "mean").item() for name, total in sums.items()}


@torch.no_grad()
def token_accuracy(
    accelerator: Accelerator, model: torch.nn.Module, batches: Iterable[dict], counted_batches: int
) -> dict[str, float]:
    """Stage 2: loss and share of supervised tokens that the LLM ranks first, over all tokens of the counted batches."""
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)  # loss, correct, tokens
    for number, batch in enumerate(batches):
        batch = send_to_device(batch, accelerator.device)
        outputs = model(**batch)
        if number >= counted_batches:
            continue
        labels, logits = batch["labels"], outputs.logits
        if logits.shape[1] != labels.shape[1] or not accelerator.unwrap_model(model).config.is_encoder_decoder:
            labels, logits = labels[:, 1:], logits[:, -labels.shape[1] : -1]  # decoder-only: predict the next token
        counted = labels != IGNORE
        correct = ((logits.argmax(-1) == labels) & counted).sum()
        tokens = counted.sum()
        totals += torch.stack(
            [outputs.loss.double().cpu() * tokens.cpu(), correct.double().cpu(), tokens.double().cpu()]
        )
    loss, correct, tokens = accelerator.reduce(totals.to(accelerator.device, torch.float32), "sum").tolist()
    return {"eval_loss": loss / max(tokens, 1), "eval_token_accuracy": correct / max(tokens, 1)}


def matching_accuracy(data: RetrievalSet, batch_size: int, temperature: float, seed: int) -> dict[str, float]:
    """Balanced accuracy of ITM: mean of the accuracies on matching and on other pairs; 0.5 is a constant predictor.

    One caption per image; within batches of `batch_size`, which are in random order, each text gets the nearest other image
    before its own, and a hard one drawn by softmax of the ITC similarity as in training.
    """
    generator = torch.Generator().manual_seed(seed)
    first_text = torch.tensor([int((data.owner == image).nonzero()[0]) for image in range(len(data.cosines))])
    image_ids = torch.tensor(data.dataset.image_ids)
    hard, random = [], []
    for images in torch.randperm(len(first_text), generator=generator).split(batch_size):
        similarity = data.cosines[images][:, first_text[images]].T / temperature  # (texts, images)
        others = image_ids[images][:, None] != image_ids[images]  # the same picture may be there twice
        has_other = others.any(dim=1)
        if not has_other.any():
            continue
        texts, others = first_text[images][has_other].tolist(), others[has_other]
        weights = similarity[has_other].masked_fill(~others, -torch.inf).softmax(dim=1)
        drawn = torch.multinomial(weights, 1, generator=generator)[:, 0]
        hard += list(zip(images[drawn].tolist(), texts))
        before = (torch.arange(len(images))[:, None] - torch.arange(1, len(images))) % len(images)
        before = before[has_other]
        nearest = before.gather(1, others.gather(1, before).int().argmax(1, keepdim=True))[:, 0]
        random += list(zip(images[nearest].tolist(), texts))
    matched = data.match_logits(torch.arange(len(first_text)), first_text).argmax(1).float().mean().item()
    results = {}
    for name, pairs in (("hard", hard), ("random", random)):
        if pairs:
            logits = data.match_logits(*torch.tensor(pairs).unbind(1))
            refused = 1 - logits.argmax(1).float().mean().item()
            results[f"itm_balanced_accuracy_{name}"] = (matched + refused) / 2
    return results
