"""Exact match of answers as a metric of Hugging Face evaluate: `evaluate.load("training/metrics/exact_match")`."""

import datasets
import evaluate

from blip2x_training.metrics.vqa_accuracy.answers import normalize_answer

from .scores import exact_match

__all__ = ["ExactMatch", "normalize_answer"]

DESCRIPTION = """Share of answers that equal a reference after normalisation: GQA and other sets with right and wrong answers.
OK-VQA's official figure is that of vqa_accuracy."""

CITATION = """@inproceedings{hudson2019gqa,
  title={{GQA}: A New Dataset for Real-World Visual Reasoning and Compositional Question Answering},
  author={Hudson, Drew A. and Manning, Christopher D.},
  booktitle={CVPR},
  year={2019}
}"""

INPUTS = """
predictions: list of str, one answer a question.
references: list of str, or list of lists of str where several answers are right.
normalization: "vqa" (default), that of the VQAv2 scorer on both sides, or "none", GQA's own comparison of strings.
Returns exact_match in percent.
"""


class ExactMatch(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=[
                datasets.Features({"predictions": text, "references": references})
                for references in (datasets.Sequence(text), text)
            ],
        )

    def _compute(
        self, predictions: list[str], references: list[str] | list[list[str]], normalization: str = "vqa"
    ) -> dict[str, float]:
        return exact_match(predictions, references, normalization)
