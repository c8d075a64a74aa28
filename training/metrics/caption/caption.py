"""Caption metrics of COCO as a metric of Hugging Face evaluate: `evaluate.load("training/metrics/caption")`.

evaluate copies the files that this one imports relatively into its cache, and only those: every file of the folder has
to be imported here.
"""

import datasets
import evaluate

from .java_scores import java_scores
from .ptb import tokenize
from .scores import caption_scores

DESCRIPTION = """BLEU-1 to 4, ROUGE-L and CIDEr-D, equal to the official COCO caption scorer and without Java; METEOR and
SPICE by the official programs, where Java and pycocoevalcap are installed."""

CITATION = """@article{chen2015microsoft,
  title={Microsoft {COCO} Captions: Data Collection and Evaluation Server},
  author={Chen, Xinlei and Fang, Hao and Lin, Tsung-Yi and Vedantam, Ramakrishna and Gupta, Saurabh and
          Doll{\\'a}r, Piotr and Zitnick, C. Lawrence},
  journal={arXiv:1504.00325},
  year={2015}
}"""

INPUTS = """
predictions: list of str, one caption an image.
references: list of lists of str, the captions of each image.
java: bool, default True. False leaves METEOR and SPICE out without a word.
Returns Bleu_1, Bleu_2, Bleu_3, Bleu_4, ROUGE_L, CIDEr (as fractions; CIDEr up to 10), and METEOR and SPICE.
"""


class Caption(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]], java: bool = True) -> dict[str, float]:
        scores = caption_scores(predictions, references)
        if java:
            scores |= java_scores(
                [tokenize(text) for text in predictions], [[tokenize(text) for text in texts] for texts in references]
            )
        return scores
