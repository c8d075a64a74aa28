"""Validation by what a model writes: captions by CIDEr and BLEU-4, answers by VQA accuracy or exact match."""

from collections.abc import Callable

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object, send_to_device
from collators import CausalLMCollator, Seq2SeqLMCollator, Stage1Collator, collate_images
from data import CaptionDataset
from metrics.caption.scores import caption_scores
from metrics.vqa_accuracy.answers import normalize_answer
from metrics.vqa_accuracy.scores import vqa_accuracy

from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xForPreTraining, Blip2xProcessor

CAPTION_TOKENS, ANSWER_TOKENS = 30, 10
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
ANNOTATORS = 10  # of VQAv2, whose accuracy is defined for as many answers


def score_language(
    accelerator: Accelerator,
    model: Blip2xForConditionalGeneration,
    processor: Blip2xProcessor,
    dataset: CaptionDataset,
    collator: CausalLMCollator | Seq2SeqLMCollator,
    batch_size: int,
    samples: int,
) -> dict[str, float]:
    """Greedy captions, or answers where the data set has questions, of the first `samples` rows against all references."""
    if accelerator.distributed_type in SHARDED:
        return {}  # a shard cannot generate by itself, and processes write texts of different lengths
    asked = dataset.asks

    def write(items: list[dict]) -> list[str]:
        batch = send_to_device(collator.prompts(items), accelerator.device)
        with accelerator.autocast():
            ids = model.generate(**batch, max_new_tokens=ANSWER_TOKENS if asked else CAPTION_TOKENS, do_sample=False)
        return processor.batch_decode_new(ids.cpu(), batch["input_ids"].cpu())

    texts = write_all(accelerator, model, dataset, batch_size, samples, write)
    references = dataset.references[: len(texts)]
    return answer_figures(texts, references) if asked else caption_figures(texts, references)


def score_itg(
    accelerator: Accelerator,
    model: Blip2xForPreTraining,
    dataset: CaptionDataset,
    collator: Stage1Collator,
    batch_size: int,
    samples: int,
) -> dict[str, float]:
    """Greedy captions of the ITG head, without a language model."""
    if accelerator.distributed_type in SHARDED:
        return {}

    def write(items: list[dict]) -> list[str]:
        images = send_to_device(collate_images(items, collator.image_processor, collator.cropped), accelerator.device)
        with accelerator.autocast():
            ids = model.generate(**images, max_new_tokens=CAPTION_TOKENS, do_sample=False)
        return collator.tokenizer.batch_decode(ids, skip_special_tokens=True)

    texts = write_all(accelerator, model, dataset, batch_size, samples, write)
    return caption_figures(texts, dataset.references[: len(texts)])


@torch.no_grad()
def write_all(
    accelerator: Accelerator,
    model: torch.nn.Module,
    dataset: CaptionDataset,
    batch_size: int,
    samples: int,
    write: Callable[[list[dict]], list[str]],
) -> list[str]:
    """Texts for the first `samples` rows, shared among processes; the whole list on each of them."""
    model.eval()
    rows = range(min(samples, len(dataset)))
    own = rows[accelerator.process_index :: accelerator.num_processes]
    texts = {}
    for start in range(0, len(own), batch_size):
        part = own[start : start + batch_size]
        texts |= dict(zip(part, write([dataset[0, row] for row in part])))
    gathered = {row: text for texts in gather_object([texts]) for row, text in texts.items()}
    return [gathered[row] for row in rows]


def caption_figures(texts: list[str], references: list[list[str]]) -> dict[str, float]:
    scores = caption_scores(texts, references)
    return {"eval_cider": scores["CIDEr"], "eval_bleu4": scores["Bleu_4"]}


def answer_figures(texts: list[str], references: list[list[str]]) -> dict[str, float]:
    """In percent. With ten answers to each question the official VQA accuracy, else the share that equals any of them."""
    if all(len(answers) == ANNOTATORS for answers in references):
        return {"eval_vqa_accuracy": vqa_accuracy(texts, references)["overall"]}
    right = [
        normalize_answer(text) in {normalize_answer(answer) for answer in answers}
        for text, answers in zip(texts, references)
    ]
    return {"eval_exact_match": 100 * sum(right) / len(right)}
