"""What models write for images: captions and answers, by a language model or by the ITG head, shared among processes.

Validation in training (greedy, the first rows) and run_evaluation.py (beams, every row, resumable) write through here.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object, send_to_device

from modeling_blip2x import Blip2xForConditionalGeneration, Blip2xForPreTraining, Blip2xProcessor
from modeling_blip2x.decoding_blip2x import decode_until

from ..data.caption_dataset import CaptionDataset
from ..data.collators import CausalLMCollator, Seq2SeqLMCollator, Stage1Collator, collate_images
from ..metrics.caption.scores import caption_scores
from ..metrics.exact_match.scores import exact_match
from ..metrics.vqa_accuracy.scores import vqa_accuracy
from .grounding import caption_grounding

CAPTION_TOKENS, ANSWER_TOKENS = 30, 10
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
ANNOTATORS = 10  # of VQAv2, whose accuracy is defined for as many answers
Write = Callable[[list[dict]], list[str]]  # a text for each item: `image` or `vision_embeds`, and `prompt`


class Record(Protocol):
    """Keeps results of numbers as they come, for a run that is stopped to go on: evaluation.journal.Journal."""

    results: dict[int, object]

    def add(self, results: dict[int, object]) -> None: ...


def language_writer(
    accelerator: Accelerator,
    model: Blip2xForConditionalGeneration,
    processor: Blip2xProcessor,
    collator: CausalLMCollator | Seq2SeqLMCollator,
    **generation: object,
) -> Write:
    """Texts of a language model after each item's prompt, up to the first line break: OPT goes on after one."""

    def write(items: list[dict]) -> list[str]:
        batch = send_to_device(collator.prompts(items), accelerator.device)
        with accelerator.autocast():
            ids = model.generate(**batch, do_sample=False, **generation)
        texts = processor.batch_decode_new(ids.cpu(), batch["input_ids"].cpu())
        return [text.split("\n")[0].strip() for text in texts]

    return write


def itg_writer(
    accelerator: Accelerator, model: Blip2xForPreTraining, collator: Stage1Collator, **generation: object
) -> Write:
    """Captions of the ITG head, without a language model."""

    def write(items: list[dict]) -> list[str]:
        images = send_to_device(collate_images(items, collator.image_processor, collator.cropped), accelerator.device)
        with accelerator.autocast():
            ids = model.generate(**images, do_sample=False, **generation)
        return decode_until(collator.tokenizer, ids.tolist(), collator.tokenizer.sep_token_id)

    return write


@torch.no_grad()
def share_work(
    accelerator: Accelerator,
    count: int,
    batch_size: int,
    work: Callable[[list[int]], list],
    record: Record | None = None,
) -> list:
    """Results of the numbers 0 .. count - 1, on every process, each worked out once.

    Batches are cut from all numbers before processes take their turns, so a number has the same neighbours however many
    processes there are, also when a stopped run goes on.

    Args:
        work: gives a result for each of its numbers.
        record: has what an earlier run got, and gets every batch as it is done.
    """
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    known = {} if record is None else dict(record.results)
    left = [batch for batch in batches if any(number not in known for number in batch)]
    own = {}
    for batch in left[accelerator.process_index :: accelerator.num_processes]:
        results = dict(zip(batch, work(list(batch)), strict=True))
        own |= results
        if record is not None:
            record.add(results)
    for results in gather_object([own]):
        known |= results
    return [known[number] for number in range(count)]


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
    tokens = ANSWER_TOKENS if dataset.asks else CAPTION_TOKENS
    write = language_writer(accelerator, model, processor, collator, max_new_tokens=tokens)
    texts = write_rows(accelerator, model, dataset, batch_size, samples, write)
    references = dataset.references[: len(texts)]
    if dataset.asks:
        return answer_figures(texts, references)
    return caption_figures(texts, references, dataset.image_ids[: len(texts)])


def score_itg(
    accelerator: Accelerator,
    model: Blip2xForPreTraining,
    dataset: CaptionDataset,
    collator: Stage1Collator,
    batch_size: int,
    samples: int,
) -> dict[str, float]:
    """Greedy captions of the ITG head for the first `samples` rows."""
    if accelerator.distributed_type in SHARDED:
        return {}
    write = itg_writer(accelerator, model, collator, max_new_tokens=CAPTION_TOKENS)
    texts = write_rows(accelerator, model, dataset, batch_size, samples, write)
    return caption_figures(texts, dataset.references[: len(texts)], dataset.image_ids[: len(texts)])


def write_rows(
    accelerator: Accelerator,
    model: torch.nn.Module,
    dataset: CaptionDataset,
    batch_size: int,
    samples: int,
    write: Write,
) -> list[str]:
    """Texts for the first `samples` rows of a training data set; the whole list on each process."""
    model.eval()
    count = min(samples, len(dataset))
    return share_work(accelerator, count, batch_size, lambda rows: write([dataset[0, row] for row in rows]))


def caption_figures(texts: list[str], references: list[list[str]], images: list[int]) -> dict[str, float]:
    """CIDEr and BLEU-4, 1 is 100 %, and whether the captions depend on their images: see `caption_grounding`."""
    scores, grounding = caption_scores(texts, references), caption_grounding(texts, references, images)
    figures = {"cider": scores["CIDEr"], "bleu4": scores["Bleu_4"]} | grounding
    return {f"eval_{name}": value for name, value in figures.items()}


def answer_figures(texts: list[str], references: list[list[str]]) -> dict[str, float]:
    """In percent. With ten answers to each question the official VQA accuracy, else the share that equals any of them."""
    if all(len(answers) == ANNOTATORS for answers in references):
        return {"eval_vqa_accuracy": vqa_accuracy(texts, references)["overall"]}
    return {"eval_exact_match": exact_match(texts, references)["exact_match"]}
