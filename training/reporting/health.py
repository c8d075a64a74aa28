"""Warnings about the health of a run: ITM at the constant predictor, queries that have become one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

CONSTANT_LOSS, CONSTANT_ACCURACY = 0.6365, 0.667  # entropy and accuracy of "no match" at one match to two negatives
NEAR = 0.01
WINDOW = 50  # fewest steps to judge by: single lines are too noisy
COLLAPSED = 0.99  # mean cosine of two queries of one image
SETTLED = 50  # steps of training before queries are judged: they may start together
SMALLEST_WORTH = 1e-3  # nats a token


class Watch:
    """Looks at the lines of metrics.jsonl and says once, in words, what is wrong."""

    def __init__(self, warmup_steps: int, say: Callable[[str], None]):
        self.warmup_steps, self.say, self.told = warmup_steps, say, set()
        self.lines: list[dict] = []

    def look(self, line: dict) -> None:
        """A line of training, after warm-up gathered to windows, or of validation."""
        if line.get("query_similarity", 0.0) > COLLAPSED and ("lr" not in line or line["step"] >= SETTLED):
            self.tell(
                "queries",
                f"Step {line['step']}: the queries have collapsed onto one another (mean cosine of their outputs "
                f"{line['query_similarity']:.3f}), so all of them tell the same of an image. Start stage 1 over with "
                "--query_spread 1 and no dropout, which keeps them apart; stage 2, from such a stage 1, with a lower "
                "--pretrained_lr_scale, --learning_rate or more --warmup_steps.",
            )
        worth = line.get("eval_image_worth", float("inf"))
        if worth < max(2 * line.get("eval_image_worth_error", 0.0), SMALLEST_WORTH):
            self.tell(
                "image",
                f"Step {line['step']}: the images are worth nothing to the language model: with those of other rows its loss "
                f"rises by {worth:.4f} nats a token, give or take {line.get('eval_image_worth_error', 0.0):.4f}, so what it "
                "writes does not depend on them. It may come with more steps; else look at stage 1 (its retrieval, "
                "query_similarity) and lower --pretrained_lr_scale, so that what stage 1 has learned is kept.",
            )
        if "loss_itm" not in line or "lr" not in line or line["step"] <= self.warmup_steps:
            return
        self.lines.append(line)
        if line["step"] - self.lines[0]["step"] + 1 < WINDOW:
            return
        loss, accuracy = (
            sum(one[name] for one in self.lines) / len(self.lines) for name in ("loss_itm", "itm_accuracy")
        )
        self.lines = []
        if abs(loss - CONSTANT_LOSS) < NEAR and abs(accuracy - CONSTANT_ACCURACY) < NEAR:
            self.tell(
                "itm",
                f"Step {line['step']}: ITM answers 'no match' to everything (mean loss {loss:.4f}, accuracy "
                f"{accuracy:.3f}; the constant predictor has 0.6365 and 0.667). Hard negatives drawn by an ITC that knows "
                "little leave it little to learn. It may leave that state later; --hard_negative_steps N starts with easier ones.",
            )

    def tell(self, kind: str, text: str) -> None:
        if kind not in self.told:
            self.told.add(kind)
            self.say(f"warning: {text}")


@contextmanager
def query_similarity(model: torch.nn.Module, active: bool = True) -> Iterator[dict[str, float]]:
    """Context in which the first batch that passes the Q-Former fills the dict: `query_similarity`, no extra forward.

    The mean cosine of two different query outputs of one image: 1 when all queries are alike. Nothing unless `active`: a
    device has to be waited for.
    """
    figures = {}
    if not active:
        yield figures
        return

    def read(layer, arguments, output) -> None:
        num_queries = arguments[1]
        if not figures and num_queries > 1:
            figures["query_similarity"] = mean_cosine(output[0][:, :num_queries])

    handle = model.shared_model.qformer.layers[-1].register_forward_hook(read)
    try:
        yield figures
    finally:
        handle.remove()


@torch.no_grad()
def mean_cosine(queries: torch.Tensor) -> float:
    """Of all pairs of different rows, queries (B, Q, H)."""
    with torch.autocast(queries.device.type, enabled=False):  # bfloat16 knows cosines near 1 to 1/256 only
        unit = torch.nn.functional.normalize(queries.float(), dim=-1)
        cosines = unit @ unit.transpose(1, 2)
    count = queries.shape[1]
    return ((cosines.sum(dim=(1, 2)) - count) / (count * (count - 1))).mean().item()
