"""Validation of both stages: losses, image-text matching and retrieval; token accuracy."""

import math
from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from collators import CausalLMCollator, Seq2SeqLMCollator, Stage1Collator
from data import CaptionDataset, make_loader
from loop import MEASURED
from metrics.retrieval_recall.scores import recall_at_k
from order import BatchOrder, EpochOrder
from written import score_itg, score_language

from modeling_blip2x import Blip2xProcessor


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
        for name in MEASURED:
            if outputs.get(name) is not None:
                sums[name] = sums.get(name, 0.0) + outputs[name].float()
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
        counted = labels != -100
        correct = ((logits.argmax(-1) == labels) & counted).sum()
        tokens = counted.sum()
        totals += torch.stack(
            [outputs.loss.double().cpu() * tokens.cpu(), correct.double().cpu(), tokens.double().cpu()]
        )
    loss, correct, tokens = accelerator.reduce(totals.to(accelerator.device, torch.float32), "sum").tolist()
    return {"eval_loss": loss / max(tokens, 1), "eval_token_accuracy": correct / max(tokens, 1)}


class RetrievalSet:
    """Images and all their captions, encoded once: vision features in memory, ITC features, token ids.

    `owner` (M,) is the image of each caption.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: torch.nn.Module,
        dataset: CaptionDataset,
        collator: Stage1Collator,
        accelerator: Accelerator,
        batch_size: int = 64,
    ):
        model.eval()
        self.model, self.accelerator, self.batch_size = model, accelerator, batch_size
        self.device = device = accelerator.device
        self.owner = torch.tensor([row for row, texts in enumerate(dataset.texts) for _ in texts])
        texts = [text for row in dataset.texts for text in row]
        encoded = collator.tokenizer(
            texts,
            padding="longest",
            padding_side="right",
            truncation=True,
            max_length=collator.max_text_length,
            return_tensors="pt",
        )
        self.input_ids, self.attention_mask = encoded["input_ids"], encoded["attention_mask"]
        self.image_inputs, images = [], []
        for start in range(0, len(dataset), batch_size):
            batch = collator([dataset[0, row] for row in range(start, min(start + batch_size, len(dataset)))])
            embeds = batch.get("vision_embeds")
            if embeds is None:
                embeds = model.shared_model.get_vision_embeds(batch["pixel_values"].to(device)).cpu()
            self.image_inputs.append(embeds)
            images.append(model.get_image_features(vision_embeds=embeds.to(device)).pooler_output)
        self.image_inputs = torch.cat(self.image_inputs)
        features = [
            model.get_text_features(**self.text(torch.arange(start, min(start + batch_size, len(texts))))).pooler_output
            for start in range(0, len(texts), batch_size)
        ]
        self.cosines = model.itc_scores(torch.cat(images), torch.cat(features)).float().cpu()  # (N, M)

    def text(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Token ids and mask of captions, cut to the longest of them."""
        longest = int(self.attention_mask[rows].sum(1).max())
        return {
            "input_ids": self.input_ids[rows, :longest].to(self.device),
            "attention_mask": self.attention_mask[rows, :longest].to(self.device),
        }

    @torch.no_grad()
    def match_logits(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """ITM logits (pairs, 2) of image rows with text rows. Pairs of an image go together, so it is encoded once."""
        logits = torch.empty(len(images), 2)
        for rows in images.argsort(stable=True).split(8 * self.batch_size):
            used, index = images[rows].unique(return_inverse=True)
            with self.accelerator.autocast():  # many pairs; ITC above stays in full precision, its ranks are close
                part = self.model.itm_logits(
                    vision_embeds=self.image_inputs[used].to(self.device),
                    image_index=index.to(self.device),
                    **self.text(texts[rows]),
                )
            logits[rows] = part.float().cpu()
        return logits


def rerank(data: RetrievalSet, k: int, temperature: float) -> dict[str, float]:
    """R@K after re-ranking each query's k best by ITC, in three modes.

    itm: match logit (the paper). itm+itc: match logit + cosine (LAVIS). itm+logits: ITC logit, that is cosine /
    temperature, + half of the match log-odds. ITM is trained against negatives drawn by softmax of the ITC logits, so its
    log-odds tend to what ITC does not know yet, and the two add up; the first two modes rely on ITM having learnt
    everything anew. Half, because a model trained on few images is too sure of pairs it has not seen.
    """
    cosines = data.cosines
    k_texts, k_images = min(k, cosines.shape[1]), min(k, cosines.shape[0])
    texts_of_image, images_of_text = cosines.topk(k_texts, dim=1).indices, cosines.topk(k_images, dim=0).indices
    shortlists = {
        "i2t": torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, texts_of_image, True),
        "t2i": torch.zeros_like(cosines, dtype=torch.bool).scatter_(0, images_of_text, True),
    }
    images, texts = (shortlists["i2t"] | shortlists["t2i"]).nonzero(as_tuple=True)
    no_match, match = data.match_logits(images, texts).unbind(1)
    logits, odds = torch.zeros_like(cosines), torch.zeros_like(cosines)
    logits[images, texts], odds[images, texts] = match, match - no_match
    results = {}
    for mode, scores in (
        ("itm", logits),
        ("itm+itc", logits + cosines),
        ("itm+logits", cosines / temperature + odds / 2),
    ):
        for way, shortlist in shortlists.items():
            # Everything outside the shortlist keeps its ITC order below it, in double: single would make ties of it.
            recalls = recall_at_k(torch.where(shortlist, scores, cosines.double() - 1e4), data.owner)
            results |= {f"{name}_{mode}": value for name, value in recalls.items() if name.startswith(way)}
    return results


def matching_accuracy(data: RetrievalSet, batch_size: int, temperature: float, seed: int) -> dict[str, float]:
    """Balanced accuracy of ITM: mean of the accuracies on matching and on other pairs; 0.5 is a constant predictor.

    One caption per image; within batches of `batch_size` each text gets a random other image, and a hard one drawn by
    softmax of the ITC similarity as in training.
    """
    generator = torch.Generator().manual_seed(seed)
    first_text = torch.tensor([int((data.owner == image).nonzero()[0]) for image in range(len(data.cosines))])
    hard, random = [], []
    for images in torch.randperm(len(first_text), generator=generator).split(batch_size):
        if len(images) > 1:
            similarity = data.cosines[images][:, first_text[images]].T / temperature  # (texts, images)
            weights = similarity.fill_diagonal_(-torch.inf).softmax(dim=1)
            hard += list(
                zip(
                    images[torch.multinomial(weights, 1, generator=generator)[:, 0]].tolist(),
                    first_text[images].tolist(),
                )
            )
            random += list(zip(images.roll(1).tolist(), first_text[images].tolist()))
    matched = data.match_logits(torch.arange(len(first_text)), first_text).argmax(1).float().mean().item()
    results = {}
    for name, pairs in (("hard", hard), ("random", random)):
        if pairs:
            logits = data.match_logits(*torch.tensor(pairs).unbind(1))
            refused = 1 - logits.argmax(1).float().mean().item()
            results[f"itm_balanced_accuracy_{name}"] = (matched + refused) / 2
    return results
