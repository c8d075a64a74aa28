"""Retrieval recall as a metric of Hugging Face evaluate: `evaluate.load("training/metrics/retrieval_recall")`."""

import datasets
import evaluate

from .scores import retrieval_recall

DESCRIPTION = """Recall at 1, 5 and 10 and median rank of image-to-text and text-to-image retrieval from a matrix of scores,
several texts an image; wrong candidates that tie count as ranked before the right one."""

CITATION = """@article{karpathy2014deep,
  title={Deep Visual-Semantic Alignments for Generating Image Descriptions},
  author={Karpathy, Andrej and Fei-Fei, Li},
  journal={arXiv:1412.2306},
  year={2014}
}"""

INPUTS = """
scores: N x M, of N images with M texts, higher is better; nested lists or a numpy array.
text_to_image: list of M int, the row of each text's image.
Returns i2t_r1, i2t_r5, i2t_r10, t2i_r1, t2i_r5, t2i_r10 in percent, and i2t_median_rank, t2i_median_rank.
"""


class RetrievalRecall(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        # Only scores have a row an image; text_to_image is M long and reaches _compute as a plain argument.
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"scores": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, scores: list[list[float]], text_to_image: list[int] | None = None) -> dict[str, float]:
        if text_to_image is None:
            raise ValueError(
                "text_to_image is missing: pass compute(scores=N x M, text_to_image=[row of each text's image])."
            )
        return retrieval_recall(scores, text_to_image)
