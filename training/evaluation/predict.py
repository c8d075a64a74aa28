"""The four tasks: from samples to a prediction each, shared among processes and kept in the journal."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..data.images import BadRow
from ..metrics.retrieval_recall.scores import ranks, retrieval_recall
from .choosing import candidate_ranker, class_ranker
from .evaluated_model import Checkpoint
from .fields import EvaluationArguments
from .image_worth import image_worth
from .journal import Journal
from .retrieval import RetrievalSet, match_shortlists, mode_scores, ranked_scores, shortlists
from .samples import EvaluationSet
from .writing import itg_writer, language_writer, share_work

WORTH_ROWS = 200  # whose loss is computed with their own and with another image: a look, not a second evaluation
TOP = 5  # candidates and texts that predictions.json lists


@dataclass
class Predictions:
    """What a task gives.

    found: for each sample `prediction`, in some tasks with `score` and `top`; or `skipped`, why there is none.
    metrics: figures that need the scores of all pairs, as recall does.
    """

    found: list[dict]
    metrics: dict[str, float] = field(default_factory=dict)


def write_texts(
    args: EvaluationArguments, accelerator: Accelerator, checkpoint: Checkpoint, data: EvaluationSet, journal: Journal
) -> Predictions:
    """Captions or answers."""
    if checkpoint.stage == 1:
        collator = checkpoint.stage1_collator(args.max_text_length)
        write = itg_writer(accelerator, checkpoint.model, collator, **args.generation)
    else:
        collator = checkpoint.language_collator()
        write = language_writer(accelerator, checkpoint.model, checkpoint.processor, collator, **args.generation)

    def predict(items: list[dict]) -> list[dict]:
        return [{"prediction": text} for text in write(items)]

    return Predictions(predict_all(args, accelerator, data, journal, predict))


def choose(
    args: EvaluationArguments,
    accelerator: Accelerator,
    checkpoint: Checkpoint,
    data: EvaluationSet,
    journal: Journal,
    candidates: list[str],
) -> Predictions:
    """The likeliest of a closed set of answers or classes, and the next ones."""
    if checkpoint.stage == 1:
        rank = class_ranker(accelerator, checkpoint, candidates, args.templates, args.max_text_length)
    else:
        rank = candidate_ranker(accelerator, checkpoint, candidates)

    def predict(items: list[dict]) -> list[dict]:
        chosen = []
        for scores in torch.tensor(rank(items), dtype=torch.float64):
            best = scores.sort(descending=True, stable=True).indices[:TOP].tolist()
            top = [[candidates[one], round(scores[one].item(), 6)] for one in best]
            chosen.append({"prediction": top[0][0], "top": top})
        return chosen

    return Predictions(predict_all(args, accelerator, data, journal, predict))


def predict_all(
    args: EvaluationArguments,
    accelerator: Accelerator,
    data: EvaluationSet,
    journal: Journal,
    predict: Callable[[list[dict]], list[dict]],
) -> list[dict]:
    """A prediction for each sample, or {"skipped": reason} where its image cannot be read."""
    bar = tqdm(
        total=len(data), initial=len(journal.results), desc=args.task, disable=not accelerator.is_local_main_process
    )

    def work(numbers: list[int]) -> list[dict]:
        items = data.readable_items(numbers)
        usable = [number for number, item in items.items() if not isinstance(item, BadRow)]
        found = dict(zip(usable, predict([items[number] for number in usable]) if usable else [], strict=True))
        bar.update(len(numbers) * accelerator.num_processes)
        return [found.get(number) or {"skipped": str(items[number])} for number in numbers]

    results = share_work(accelerator, len(data), args.batch_size, work, journal)
    bar.close()
    return results


def worth_of_images(
    args: EvaluationArguments, accelerator: Accelerator, checkpoint: Checkpoint, data: EvaluationSet, found: list[dict]
) -> dict[str, float]:
    """What images are worth to a language model's loss on the first reference, over at most WORTH_ROWS samples that it
    has written for: see `image_worth`. Empty for what has no language model or no references, and where images are exchanged
    already."""
    if checkpoint.stage == 1 or args.other_images or args.task not in ("caption", "vqa"):
        return {}
    usable = [n for n, sample in enumerate(data.samples) if sample.references and "skipped" not in found[n]]
    usable = usable[:WORTH_ROWS]
    items = Subset(data, usable)
    images = [data.samples[number].image_id for number in usable]
    collator = checkpoint.language_collator()
    return image_worth(accelerator, checkpoint.model, items, collator, images, args.batch_size)


class Subset:
    """Some samples of a data set, under their places among these; `draw` splits a text that has no prompt in the middle."""

    def __init__(self, data: EvaluationSet, numbers: list[int]):
        self.data, self.numbers = data, numbers

    def __getitem__(self, key: tuple[int, int]) -> dict:
        return self.data[key[0], self.numbers[key[1]]] | {"draw": 0.5}


def drop_unreadable(accelerator: Accelerator, data: EvaluationSet, batch_size: int) -> None:
    """Leave out what retrieval cannot rank, with a report: images that cannot be decoded or have no text."""

    def check(numbers: list[int]) -> list[str | None]:
        items = data.readable_items(numbers)
        return [
            str(items[number])
            if isinstance(items[number], BadRow)
            else (None if data.samples[number].references else "no text")
            for number in numbers
        ]

    faults = share_work(accelerator, len(data), batch_size, check)
    bad = {number: reason for number, reason in enumerate(faults) if reason is not None}
    data.skipped += [data.report(data.samples[number].row, BadRow(reason)) for number, reason in bad.items()]
    data.drop(set(bad))
    if not len(data):
        raise ValueError(f"No image can be ranked, the first: {data.skipped[0]['name']}: {data.skipped[0]['reason']}.")


def retrieve(
    args: EvaluationArguments, accelerator: Accelerator, checkpoint: Checkpoint, data: EvaluationSet, journal: Journal
) -> Predictions:
    """Each image's texts in order and each text's images; `score` of an image is 1 / rank of its best own text."""
    share = functools.partial(share_work, accelerator)
    collator = checkpoint.stage1_collator(args.max_text_length)
    encoded = RetrievalSet(checkpoint.model, data, collator, accelerator, args.batch_size, share, keep_images=False)
    cosines, owner = encoded.cosines, encoded.owner
    rankings = {"i2t": cosines, "t2i": cosines}
    if args.score_mode != "itc":
        listed = shortlists(cosines, args.rerank_k)
        bar = tqdm(
            total=len(data),
            initial=len(journal.results),
            desc="re-ranking",
            disable=not accelerator.is_local_main_process,
        )

        def share_and_keep(count: int, batch_size: int, work) -> list:
            def counted(numbers: list[int]) -> list:
                bar.update(len(numbers) * accelerator.num_processes)
                return work(numbers)

            return share_work(accelerator, count, batch_size, counted, journal)

        no_match, match = match_shortlists(encoded, listed, share_and_keep)
        bar.close()
        scores = mode_scores(args.score_mode, cosines, no_match, match, checkpoint.model.temperature.item())
        rankings = {way: ranked_scores(scores, cosines, mask) for way, mask in listed.items()}
    metrics = retrieval_figures(rankings, owner)
    if args.score_mode != "itc":
        metrics |= {
            f"{name}_itc": value for name, value in retrieval_figures(dict.fromkeys(rankings, cosines), owner).items()
        }
    image_ranks, _ = ranks(rankings["i2t"], owner)
    found = []
    for number, row in enumerate(rankings["i2t"]):
        best = row.topk(min(TOP, args.rerank_k, len(row))).indices.tolist()
        top = [[encoded.texts[text], round(row[text].item(), 6)] for text in best]
        found.append({"prediction": top[0][0], "top": top, "rank": int(image_ranks[number])})
    return Predictions(found, metrics)


def retrieval_figures(rankings: dict[str, torch.Tensor], owner: torch.Tensor) -> dict[str, float]:
    """R@1, 5, 10 in percent and median rank, each direction by its own ranking (N, M)."""
    figures = {}
    for way, scores in rankings.items():
        figures |= {name: value for name, value in retrieval_recall(scores, owner).items() if name.startswith(way)}
    return figures
