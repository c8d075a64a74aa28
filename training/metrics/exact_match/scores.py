"""Share of answers that equal a reference, for data sets that score an answer as right or wrong."""

from blip2x_training.metrics.vqa_accuracy.answers import normalize_answer

NORMALIZATIONS = {"vqa": normalize_answer, "none": str}


def exact_match(
    predictions: list[str], references: list[str] | list[list[str]], normalization: str = "vqa"
) -> dict[str, float]:
    """`exact_match` in percent: predictions that equal the reference, or any of several.

    `normalization`: "vqa" puts both sides through the VQAv2 scorer's normalisation, as the published zero-shot figures on
    GQA do for the prediction; "none" compares strings as they are, as GQA's own eval.py does. OK-VQA's official figure
    gives credit by the number of people who agree: that one is vqa_accuracy on its ten answers.
    Raises ValueError for an unknown normalisation, lists of different lengths or a question without an answer.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization is {normalization!r}; it must be one of {', '.join(NORMALIZATIONS)}.")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions, but {len(references)} references: give one each.")
    if not len(predictions):
        raise ValueError("There are no predictions to score.")
    normalize = NORMALIZATIONS[normalization]
    right = 0
    for number, (prediction, answers) in enumerate(zip(predictions, references)):
        answers = [answers] if isinstance(answers, str) else answers
        if not len(answers):
            raise ValueError(f"Question {number} has no reference answer.")
        right += normalize(prediction) in {normalize(answer) for answer in answers}
    return {"exact_match": 100 * right / len(predictions)}
