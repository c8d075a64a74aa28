"""Accuracy of answers against ten people's answers, equal to the official VQAv2 scorer (visualqa.org/evaluation.html)."""

from .answers import normalize_answer, trimmed


def answer_accuracy(prediction: str, answers: list[str]) -> float:
    """Accuracy of one answer, 0 to 1: the mean over people of min(1, other people who gave this answer / 3).

    Leaving each person out in turn makes the figure comparable to that of a person. As in the official scorer, answers are
    normalised only where people disagree: where all wrote the same, the prediction has to be written just so.
    """
    prediction, answers = trimmed(prediction), [trimmed(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalize_answer(prediction), [normalize_answer(answer) for answer in answers]
    agreeing = answers.count(prediction)
    # Where the person left out is one of those who agree, one fewer agrees.
    of_agreeing, of_others = min(1, (agreeing - 1) / 3), min(1, agreeing / 3)
    return (agreeing * of_agreeing + (len(answers) - agreeing) * of_others) / len(answers)


def vqa_accuracy(
    predictions: list[str],
    references: list[list[str]],
    question_types: list[str] | None = None,
    answer_types: list[str] | None = None,
) -> dict[str, float | dict[str, float]]:
    """VQA accuracy in percent: `overall`, and by type where types are given, `perQuestionType` and `perAnswerType`.

    `references`: the answers of each question, ten in VQAv2 and OK-VQA (whose five are counted twice). The official scorer
    rounds to two digits, this one does not. Raises ValueError when the lists differ in length or a question has no answer.
    """
    if not len(predictions):
        raise ValueError("There are no predictions to score.")
    lists = {"references": references, "question_types": question_types, "answer_types": answer_types}
    for name, values in lists.items():
        if values is not None and len(values) != len(predictions):
            raise ValueError(f"{len(predictions)} predictions, but {len(values)} {name}: give one each.")
    for number, answers in enumerate(references):
        if isinstance(answers, str) or not len(answers):
            raise ValueError(
                f"References of question {number} are {answers!r}; they must be a list of answers, usually ten."
            )
    accuracies = [100 * answer_accuracy(text, answers) for text, answers in zip(predictions, references)]
    scores = {"overall": sum(accuracies) / len(accuracies)}
    for name, types in (("perQuestionType", question_types), ("perAnswerType", answer_types)):
        if types is not None:
            groups = {}
            for kind, accuracy in zip(types, accuracies):
                groups.setdefault(kind, []).append(accuracy)
            scores[name] = {kind: sum(group) / len(group) for kind, group in groups.items()}
    return scores
