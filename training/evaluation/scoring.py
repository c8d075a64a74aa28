"""From predictions to metrics, in percent as papers give them, and a score for each sample. A metric that cannot be computed is left out, with a note that says why."""

import re
import warnings
from collections import Counter
from collections.abc import Callable

from ..metrics.caption.java_scores import java_scores
from ..metrics.caption.ptb import tokenize
from ..metrics.caption.scores import caption_scores, caption_scores_per_image
from ..metrics.exact_match.scores import exact_match
from ..metrics.vqa_accuracy.scores import answer_accuracy, vqa_accuracy
from ..metrics.wups.scores import wups
from .fields import EvaluationArguments
from .grounding import caption_grounding
from .published import OFFICIAL_SIZE, PUBLISHED
from .samples import Sample
from .writing import ANNOTATORS

SMALL_GALLERY = 10  # images of a retrieval below which its figures are luck
NOCAPS = {"in-domain": "in", "near-domain": "near", "out-domain": "out"}
MAIN = {  # what a report shows first
    "caption": "CIDEr", "vqa_accuracy": "vqa_accuracy", "exact_match": "exact_match", "wups": "wups_0.9",
    "retrieval": "i2t_r1", "classification": "top1",
}  # fmt: skip


def score_captions(records: list[dict], java: bool, notes: list[str]) -> dict[str, float]:
    """COCO's figures; also by NoCaps' domains, each with the document frequencies of its own references, as its server
    scores them, and what `caption_grounding` tells. Gives each record its CIDEr as `score`. CIDEr of a single image is 0 whatever it says, so it is left out."""
    parts = {"": records}
    for domain in sorted({record["groups"].get("domain") for record in records} - {None}):
        parts[f"_{NOCAPS.get(domain, domain)}"] = [one for one in records if one["groups"].get("domain") == domain]
    figures = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for ending, part in parts.items():
            texts, references = [one["prediction"] for one in part], [one["references"] for one in part]
            scores = in_percent(caption_scores(texts, references))
            if java:
                scores |= in_percent(java_scores([tokenize(text) for text in texts], tokenized_all(references)))
            if len(part) == 1:
                scores.pop("CIDEr")
            figures |= {f"{name}{ending}": value for name, value in scores.items()}
    # User warnings alone: files that garbage collection closes give warnings too.
    own = [warning for warning in caught if issubclass(warning.category, UserWarning)]
    notes += dict.fromkeys(str(warning.message) for warning in own)
    if len(records) > 1:
        texts, references = [record["prediction"] for record in records], [record["references"] for record in records]
        grounding = caption_grounding(texts, references, [record["image_id"] for record in records])
        if "cider_other_images" in grounding:
            figures["CIDEr_other_images"] = 100 * grounding.pop("cider_other_images")
        figures |= grounding
        for record, score in zip(records, caption_scores_per_image(texts, references)["CIDEr"]):
            record["score"] = 100 * score
    return figures


def in_percent(scores: dict[str, float]) -> dict[str, float]:
    return {name: 100 * value for name, value in scores.items()}


def tokenized_all(references: list[list[str]]) -> list[list[list[str]]]:
    return [[tokenize(text) for text in texts] for texts in references]


def choose_metric(args: EvaluationArguments, records: list[dict]) -> str:
    """What answers are scored by: as asked, else by how many answers each question has."""
    if args.metric:
        return args.metric
    return "vqa_accuracy" if all(len(record["references"]) == ANNOTATORS for record in records) else "exact_match"


def score_answers(
    metric: str, records: list[dict], lemmatize: Callable[[str], str] | None, wordnet: str | None, notes: list[str]
) -> dict[str, float]:
    """Figures of answers; also by question and answer type. Gives each record its share of credit as `score`."""
    answers = [record["prediction"] if lemmatize is None else lemmatize(record["prediction"]) for record in records]
    references = [record["references"] for record in records]
    if lemmatize is not None:
        for record, answer in zip(records, answers):
            record["scored_as"] = answer
    if metric == "vqa_accuracy":
        figures = {"vqa_accuracy": vqa_accuracy(answers, references)["overall"]}
        scores = [100 * answer_accuracy(answer, given) for answer, given in zip(answers, references)]
    else:
        answers = [as_items(answer) for answer in answers] if metric == "wups" else answers
        right = {kind: [equals(a, given, kind) for a, given in zip(answers, references)] for kind in ("vqa", "none")}
        figures = {"exact_match": mean(right["vqa"]), "exact_match_as_written": mean(right["none"])}
        scores = right["vqa"]
    if metric == "wups":
        try:
            figures |= wups(answers, references, wordnet)
        except FileNotFoundError as error:
            notes.append(f"WUPS is left out: {error}")
    for record, score in zip(records, scores):
        record["score"] = score
    for kind in ("question_type", "answer_type"):
        groups: dict[str, list[float]] = {}
        for record, score in zip(records, scores):
            if kind in record["groups"]:
                groups.setdefault(record["groups"][kind], []).append(score)
        figures |= {f"{kind}/{name}": mean(values) for name, values in sorted(groups.items())}
    return figures


def equals(answer: str, references: list[str], normalization: str) -> float:
    return exact_match([answer], [references], normalization)["exact_match"]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def as_items(answer: str) -> str:
    """DAQUAR's spelling of an answer: items with a comma between, words of an item joined by _."""
    return ", ".join("_".join(item.split()) for item in re.split(r",| and ", answer) if item.strip())


def score_classes(records: list[dict]) -> dict[str, float]:
    """Accuracy of the first and of the first five classes; each record's `score` is 100 or 0."""
    for record in records:
        record["score"] = 100.0 * (record["prediction"] in record["references"])
    top5 = [100.0 * any(name in record["references"] for name, _ in record["top"]) for record in records]
    return {"top1": mean([record["score"] for record in records]), "top5": mean(top5)}


def make_records(samples: list[Sample], found: list[dict], names: list[str]) -> tuple[list[dict], list[dict]]:
    """Predictions with their samples, and reports of what was skipped while predicting."""
    records, skipped = [], []
    for number, (sample, result) in enumerate(zip(samples, found, strict=True)):
        if "skipped" in result:
            skipped.append({"row": sample.row, "name": names[number], "reason": result["skipped"]})
            continue
        asked = {"question": sample.question, "question_id": sample.question_id} if sample.question else {}
        records.append(
            {
                "number": number,
                "image_id": sample.image_id,
                "image": names[number],
                **asked,
                "references": sample.references,
                "groups": sample.groups,
                **result,
            }
        )
    return records, skipped


def score(
    args: EvaluationArguments,
    records: list[dict],
    metrics: dict[str, float],
    lemmatize: Callable[[str], str] | None,
    notes: list[str],
) -> tuple[dict[str, float], str]:
    """All figures, and the name of the main one. Samples without reference are not scored."""
    scored = [record for record in records if record["references"]]
    if not scored:
        notes.append("Nothing is scored: the data has no references. The results file is for the evaluation server.")
        return metrics, ""
    notes += comparability(args, len(scored))
    if args.task == "caption":
        return score_captions(scored, args.java_metrics, notes), MAIN["caption"] if len(scored) > 1 else "Bleu_4"
    if args.task == "vqa":
        metric = choose_metric(args, scored)
        figures = score_answers(metric, scored, lemmatize, args.wordnet, notes)
        return figures, MAIN[metric] if MAIN[metric] in figures else "exact_match"
    if args.task == "classification":
        return score_classes(scored), MAIN["classification"]
    for record in scored:
        record["score"] = 100.0 / record["rank"]
    notes += texts_of_several_images(scored)
    return metrics, MAIN["retrieval"]


def comparability(args: EvaluationArguments, scored: int) -> list[str]:
    """What keeps these figures from being read beside the published ones."""
    if args.task == "retrieval" and scored < SMALL_GALLERY:
        return [
            f"Only {scored} images: drawing lots reaches i2t_r1 {100 / scored:.0f}, not comparable with published figures."
        ]
    official = OFFICIAL_SIZE.get(args.benchmark)
    if not PUBLISHED.get(args.benchmark) or scored == official:
        return []
    if args.task == "retrieval":
        return [f"A gallery of {scored} images; the published figures are of {official}: not comparable."]
    return [f"{scored} samples; the published figures are of {official}: not comparable."]


def texts_of_several_images(records: list[dict]) -> list[str]:
    """A note where texts are equal: retrieval takes that of another image for wrong, as the official figures do."""
    images = Counter(text for record in records for text in set(record["references"]))
    shared = sum(count > 1 for count in images.values())
    if not shared:
        return []
    return [f"Texts that several images have: {shared}. Finding that of another image counts as wrong."]


def counts(records: list[dict], skipped: list[dict]) -> dict[str, int]:
    seen = Counter(
        samples=len(records) + len(skipped),
        scored=sum(bool(record["references"]) for record in records),
        without_reference=sum(not record["references"] for record in records),
        empty_predictions=sum(not record["prediction"].strip() for record in records),
        skipped=len(skipped),
    )
    return dict(seen)
