"""VQA accuracy as a metric of Hugging Face evaluate: `evaluate.load("training/metrics/vqa_accuracy")`."""

import datasets
import evaluate

from .answers import normalize_answer
from .scores import vqa_accuracy

__all__ = ["VqaAccuracy", "normalize_answer"]  # evaluate copies only what this file imports, answers.py too

DESCRIPTION = """Accuracy of open answers against the answers of ten people, equal to the official VQAv2 scorer; also the
official measure of OK-VQA."""

CITATION = """@inproceedings{goyal2017making,
  title={Making the {V} in {VQA} Matter: Elevating the Role of Image Understanding in Visual Question Answering},
  author={Goyal, Yash and Khot, Tejas and Summers-Stay, Douglas and Batra, Dhruv and Parikh, Devi},
  booktitle={CVPR},
  year={2017}
}"""

INPUTS = """
predictions: list of str, one answer a question.
references: list of lists of str, the ten answers of each question.
question_types, answer_types: lists of str, one a question; optional.
Returns overall in percent, and perQuestionType and perAnswerType (dicts of percents) where types are given.
"""


class VqaAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[list[str]],
        question_types: list[str] | None = None,
        answer_types: list[str] | None = None,
    ) -> dict[str, float | dict[str, float]]:
        return vqa_accuracy(predictions, references, question_types, answer_types)
