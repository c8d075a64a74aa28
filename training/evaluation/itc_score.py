"""A score of captions without references: the ITC cosine of image and caption by a stage-1 model.

Like CLIPScore (Hessel et al. 2021) it asks an image-text model how well the two fit, but it is our own: BLIP-2's cosine,
the best of the image's queries, in percent, without CLIPScore's factor of 2.5. Figures of different scorers cannot be
compared; `itc_score_references`, the same of the human captions, tells what this scorer gives to good ones.
"""

import torch
from accelerate import Accelerator

from ..data.transforms import clean_caption
from .evaluated_model import load_checkpoint
from .fields import EvaluationArguments
from .samples import EvaluationSet
from .writing import share_work


def score_by_itc(
    args: EvaluationArguments, accelerator: Accelerator, data: EvaluationSet, found: list[dict]
) -> dict[str, float]:
    """Mean cosines in percent; each prediction in `found` gets its own as `itc_score`."""
    scorer = load_checkpoint(args.scorer, accelerator.device)
    if scorer.stage != 1:
        raise ValueError(f"--scorer {args.scorer} is of stage 2, which has no ITC. Give a stage-1 checkpoint.")
    model, collator = scorer.model, scorer.stage1_collator(args.max_text_length)
    numbers = [number for number, result in enumerate(found) if result.get("prediction", "").strip()]

    def work(places: list[int]) -> list[list[float]]:
        chosen = [numbers[place] for place in places]
        texts = [[found[number]["prediction"], *data.samples[number].references] for number in chosen]
        items = [
            data[0, number] | {"text": clean_caption(own)} for number, group in zip(chosen, texts) for own in group[:1]
        ]
        batch = collator(items)
        images = model.get_image_features(batch["pixel_values"].to(accelerator.device)).pooler_output
        encoded = collator.tokenizer(
            [clean_caption(text) for group in texts for text in group],
            padding=True, truncation=True, max_length=args.max_text_length, return_tensors="pt",
        ).to(accelerator.device)  # fmt: skip
        features = model.get_text_features(encoded["input_ids"], encoded["attention_mask"]).pooler_output
        cosines = model.itc_scores(images, features).float().cpu()
        owner = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(group) for group in texts]))
        own = cosines[owner, torch.arange(len(owner))]
        return [part.tolist() for part in own.split([len(group) for group in texts])]

    scores = share_work(accelerator, len(numbers), args.batch_size, work)
    for number, own in zip(numbers, scores):
        found[number]["itc_score"] = 100 * own[0]
    references = [sum(own[1:]) / len(own[1:]) for own in scores if len(own) > 1]
    figures = {"itc_score": 100 * sum(own[0] for own in scores) / len(scores)} if scores else {}
    return figures | ({"itc_score_references": 100 * sum(references) / len(references)} if references else {})
