"""Retrieval with a stage-1 model: ITC over all pairs, then ITM on the best of each query (section 4.4 of the paper).

Validation in training and run_evaluation.py score through here.
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from ..data.collators import Stage1Collator
from ..metrics.retrieval_recall.scores import recall_at_k

MODES = ("itc", "itm", "itm+itc", "itm+logits")
PIECES = 16  # that small sets are cut into at least, for processes to share
PAIRS_AT_ONCE = 512  # whose images have their keys and values in memory together
Share = Callable[[int, int, Callable[[list[int]], list]], list]  # (count, batch size, work) -> a result for each number


def alone(count: int, batch_size: int, work: Callable[[list[int]], list]) -> list:
    """All numbers on this process; `writing.share_work` shares them among processes."""
    return [
        result
        for start in range(0, count, batch_size)
        for result in work(list(range(start, min(start + batch_size, count))))
    ]


class RetrievalSet:
    """Images and all their captions: ITC cosines (N, M), and what ITM needs to score pairs of them.

    `owner` (M,) is the image of each caption.

    Args:
        dataset: `texts`, a list of captions an image, and items [0, row] that the collator's images are made of.
        share: how ITC's encoding is shared among processes.
        keep_images: hold the tower's features of all images in memory; else an image is encoded again for ITM, which
            costs little beside its pairs.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: torch.nn.Module,
        dataset: Dataset,
        collator: Stage1Collator,
        accelerator: Accelerator,
        batch_size: int = 64,
        share: Share = alone,
        keep_images: bool = True,
    ):
        model.eval()
        self.model, self.dataset, self.collator, self.accelerator = model, dataset, collator, accelerator
        self.device = accelerator.device
        self.owner = torch.tensor([row for row, texts in enumerate(dataset.texts) for _ in texts])
        self.texts = [text for row in dataset.texts for text in row]
        encoded = collator.encode(self.texts)
        self.input_ids, self.attention_mask = encoded["input_ids"], encoded["attention_mask"]
        self.kept: dict[int, torch.Tensor] | None = {} if keep_images else None

        def image_features(rows: list[int]) -> list[torch.Tensor]:
            embeds = self.embed(rows)
            if self.kept is not None:
                self.kept |= dict(zip(rows, embeds.cpu()))
            return list(model.get_image_features(vision_embeds=embeds).pooler_output.cpu())

        def text_features(rows: list[int]) -> list[torch.Tensor]:
            return list(model.get_text_features(**self.text(torch.tensor(rows))).pooler_output.cpu())

        images = torch.stack(share(len(dataset), batch_size, image_features))
        texts = torch.stack(share(len(self.texts), batch_size, text_features)).to(self.device)
        parts = [model.itc_scores(part.to(self.device), texts).float().cpu() for part in images.split(batch_size)]
        self.cosines = torch.cat(parts)  # (N, M)

    def embed(self, rows: list[int]) -> torch.Tensor:
        """Features (len(rows), positions, D) of the tower for images."""
        if self.kept is not None and all(row in self.kept for row in rows):
            return torch.stack([self.kept[row] for row in rows]).to(self.device)
        batch = self.collator([self.dataset[0, row] for row in rows])
        if batch.get("vision_embeds") is not None:
            return batch["vision_embeds"].to(self.device)
        return self.model.shared_model.get_vision_embeds(batch["pixel_values"].to(self.device))

    def text(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Token ids and mask of captions, cut to the longest of them."""
        longest = int(self.attention_mask[rows].sum(1).max())
        return {
            "input_ids": self.input_ids[rows, :longest].to(self.device),
            "attention_mask": self.attention_mask[rows, :longest].to(self.device),
        }

    @torch.no_grad()
    def match_logits(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """ITM logits (pairs, 2) of image rows with text rows. Pairs of an image go together: its keys and values are
        computed once for up to `PAIRS_AT_ONCE` of them."""
        logits = torch.empty(len(images), 2)
        for rows in images.argsort(stable=True).split(PAIRS_AT_ONCE):
            used, index = images[rows].unique(return_inverse=True)
            with self.accelerator.autocast():  # many pairs; ITC above stays in full precision, its ranks are close
                part = self.model.itm_logits(
                    vision_embeds=self.embed(used.tolist()), image_index=index.to(self.device), **self.text(texts[rows])
                )
            logits[rows] = part.float().cpu()
        return logits


def shortlists(cosines: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
    """Masks (N, M) of the pairs that ITM scores: the k best texts of each image (i2t), the k best images of each text."""
    texts = cosines.topk(min(k, cosines.shape[1]), dim=1).indices
    images = cosines.topk(min(k, cosines.shape[0]), dim=0).indices
    return {
        "i2t": torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, texts, True),
        "t2i": torch.zeros_like(cosines, dtype=torch.bool).scatter_(0, images, True),
    }


def match_shortlists(
    data: RetrievalSet, listed: dict[str, torch.Tensor], share: Share = alone
) -> tuple[torch.Tensor, torch.Tensor]:
    """ITM logits (no match, match) of the listed pairs, (N, M) each, 0 elsewhere. An image's pairs are one piece of work."""
    wanted = listed["i2t"] | listed["t2i"]

    def work(images: list[int]) -> list[list[list[float]]]:
        texts = [wanted[image].nonzero()[:, 0] for image in images]
        rows = torch.cat([torch.full((len(found),), image) for image, found in zip(images, texts)])
        logits = data.match_logits(rows, torch.cat(texts))
        return [part.tolist() for part in logits.split([len(found) for found in texts])]

    pairs_an_image = max(1, int(wanted.sum()) // len(wanted))
    images = min(PAIRS_AT_ONCE // pairs_an_image, len(wanted) // PIECES)
    found = share(len(wanted), max(1, images), work)
    no_match, match = torch.zeros_like(data.cosines), torch.zeros_like(data.cosines)
    logits = torch.tensor([pair for pairs in found for pair in pairs], dtype=data.cosines.dtype)
    no_match[wanted], match[wanted] = logits[:, 0], logits[:, 1]
    return no_match, match


def mode_scores(
    mode: str, cosines: torch.Tensor, no_match: torch.Tensor, match: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Scores (N, M) of listed pairs.

    itc: cosine. itm: match logit (the paper). itm+itc: match logit + cosine (LAVIS). itm+logits: ITC logit, that is
    cosine / temperature, + half of the match log-odds. ITM is trained against negatives drawn by softmax of the ITC
    logits, so its log-odds tend to what ITC does not know yet, and the two add up; itm and itm+itc rely on ITM having
    learnt everything anew. Half, because a model trained on few images is too sure of pairs it has not seen.
    """
    return {
        "itc": lambda: cosines,
        "itm": lambda: match,
        "itm+itc": lambda: match + cosines,
        "itm+logits": lambda: cosines / temperature + (match - no_match) / 2,
    }[mode]()


def ranked_scores(scores: torch.Tensor, cosines: torch.Tensor, listed: torch.Tensor) -> torch.Tensor:
    """Scores (N, M) in which everything outside the shortlist keeps its ITC order below it.

    In double where the two are far apart: single precision would make ties of the cosines.
    """
    return torch.where(listed, scores.double(), cosines.double() - 1e4)


def rerank(data: RetrievalSet, k: int, temperature: float) -> dict[str, float]:
    """R@K after re-ranking each query's k best by ITC, in the three modes of ITM, as NAME_MODE."""
    listed = shortlists(data.cosines, k)
    no_match, match = match_shortlists(data, listed)
    results = {}
    for mode in MODES[1:]:
        scores = mode_scores(mode, data.cosines, no_match, match, temperature)
        for way, shortlist in listed.items():
            recalls = recall_at_k(ranked_scores(scores, data.cosines, shortlist), data.owner)
            results |= {f"{name}_{mode}": value for name, value in recalls.items() if name.startswith(way)}
    return results
