"""What every suite measures with: alternating medians, and the row of the table."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Row:
    """One line of the table: ours against a baseline measured in the same run.

    ours, baseline: in `unit`; baseline None where there is nothing to compare with. ratio: how much better ours is (above
    1 is better), None without a baseline. aim: the ratio to reach. met: None without an aim;
    exponents and peaks of memory have one that is not a ratio.
    """

    suite: str
    case: str
    device: str
    dtype: str
    ours: float
    baseline: float | None
    unit: str
    ratio: float | None
    aim: float | None
    met: bool | None


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def alternating_seconds(
    functions: dict[str, Callable[[], object]], device: str, repeats: int = 5, warmup: int = 1
) -> dict[str, float]:
    """Median seconds of each function. They take turns, so that a busy machine is busy for all of them."""
    seconds = {name: [] for name in functions}
    for number in range(warmup + repeats):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def square_products(device: str, dtype: str, side: int = 2048) -> tuple[Callable[[], None], int]:
    """A function that multiplies (side, side) matrices again and again for about a second, and its FLOPs."""
    left, right = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    times = 1000 if device == "cuda" else 10

    def products() -> None:
        for _ in range(times):
            left @ right

    return products, times * 2 * side**3


def faster(suite: str, case: str, device: str, dtype: str, ours: float, baseline: float, unit: str, aim: float | None):
    """Row of two costs (seconds, bytes, FLOPs): less is better, the ratio is baseline / ours."""
    ratio = baseline / ours
    return Row(suite, case, device, dtype, ours, baseline, unit, ratio, aim, None if aim is None else ratio >= aim)
