"""How much of the machine the stage-1 step uses: its FLOPs a second, against 2048-cubed matrix products of the same dtype.

Counted are the matrix products of our forward and backward; stage1_step times step and products in turns.
"""

from benchmarks.measure import Row
from benchmarks.stage1_step import BATCHES, dtypes, timed

SHARE = {("cpu", "float32"): 0.80, ("cpu", "bfloat16"): 0.65, ("cuda", "bfloat16"): 0.40}  # aims


def run(device: str) -> list[Row]:
    rows = []
    for dtype in dtypes(device):
        for batch in BATCHES:
            timing = timed(device, dtype, batch)
            share, aim = timing.flop_rate / timing.limit, SHARE.get((device, dtype))
            met = None if aim is None else share >= aim
            case = f"forward and backward, batch {batch}; baseline: matrix product"
            figures = timing.flop_rate / 1e9, timing.limit / 1e9, "GFLOP/s", share, aim, met
            rows.append(Row("flop_rate", case, device, dtype, *figures))
    return rows
