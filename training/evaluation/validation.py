"""Validation of both stages: losses, image-text matching and retrieval; token accuracy."""

import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from modeling_blip2x import Blip2xProcessor
from modeling_blip2x.language_blip2x import IGNORE
from modeling_blip2x.losses_blip2x import itg_sum

from ..data.caption_dataset import CaptionDataset, JointDataset, make_loader
from ..data.collators import CausalLMCollator, Seq2SeqLMCollator, Stage1Collator
from ..data.order import BatchOrder, EpochOrder
from ..data.token_counts import text_tokens
from ..metrics.retrieval_recall.scores import recall_at_k
from ..reporting.meter import measured
from .image_worth import image_worth
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
    figures = image_text_losses(accelerator, model, dataset, collator, batch_size)
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
    """Stage 2 and its fine-tuning: loss and token accuracy over every row; what is written for the first `samples` rows,
    and what their images are worth."""
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
        worth = image_worth(accelerator, model, dataset, collator, dataset.image_ids[:samples], batch_size)
        figures |= {f"eval_{name}": value for name, value in worth.items()}
    return figures


@torch.no_grad()
def image_text_losses(
    accelerator: Accelerator, model: torch.nn.Module, dataset: CaptionDataset, collator: Stage1Collator, batch_size: int
) -> dict[str, float]:
    """Losses and ITM accuracy as eval_NAME, and their total.

    ITC and ITM contrast the pairs of a batch: they are means over the whole batches, of one where there are fewer rows.
    ITG is the mean over the tokens of every row, once, whatever the size of a batch.
    """
    model.eval()
    order, processes, rank = EpochOrder(len(dataset), seed=0), accelerator.num_processes, accelerator.process_index
    whole_batches = len(dataset) // (batch_size * processes)
    contrasted = BatchOrder(order, batch_size, max(1, whole_batches), rank=rank, num_processes=processes)
    sums, itg = {}, torch.zeros(2, dtype=torch.float64)  # loss and number of tokens
    for number, batch in enumerate(make_loader(dataset, contrasted, collator, 0, accelerator.device.type == "cuda")):
        batch = send_to_device(batch, accelerator.device)
        outputs = model(**batch, negative_seed=number, num_items_in_batch=1)  # one item: ITG is a sum
        for name, value in measured(outputs).items():
            sums[name] = sums.get(name, 0.0) + value
        if "loss_itg" in sums and whole_batches:  # one batch of fewer rows has some of them twice
            itg += torch.stack([outputs.loss_itg.float(), text_tokens(batch).float()]).cpu()
    means = {name: accelerator.reduce(total / len(contrasted), "mean").item() for name, total in sums.items()}
    if "loss_itg" in means:
        rest = [order(position) for position in range(whole_batches * batch_size * processes, len(dataset))]
        if rest:
            itg += rest_of_itg(accelerator, model, dataset, collator, rest)
        total, tokens = accelerator.reduce(itg.to(accelerator.device, torch.float32), "sum").tolist()
        means["loss_itg"] = total / max(tokens, 1)
    means["loss"] = sum(value for name, value in means.items() if name.startswith("loss_"))
    return {f"eval_{name}": value for name, value in means.items()}


def rest_of_itg(
    accelerator: Accelerator,
    model: torch.nn.Module,
    dataset: CaptionDataset,
    collator: Stage1Collator,
    rows: list[tuple[int, int]],
) -> torch.Tensor:
    """Summed ITG loss and number of tokens, (2,), of this process's share of rows that fill no batch."""
    own = rows[accelerator.process_index :: accelerator.num_processes]
    batch = send_to_device(collator([dataset[key] for key in own or rows[:1]]), accelerator.device)  # all take part
    ids = batch["input_ids"]
    with accelerator.autocast():
        pairs = model.encode_pairs(
            batch.get("pixel_values"),
            ids,
            batch["attention_mask"],
            batch.get("vision_embeds"),
            decoder_ids=model.decoder_ids(ids),
        )
        total = itg_sum(*model.text_logits(pairs))
    return torch.stack([total.float(), text_tokens(batch).float()]).cpu() * bool(own)


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
