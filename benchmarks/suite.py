"""All measurements side by side: ours against the plain algorithm, transformers' BLIP-2 and the machine's limit.

    python -m benchmarks.suite --suite all --device cpu --output benchmarks.json

Random weights of real sizes, no network. Both sides of a line run in turns in this process or in a process each, after a
warm-up; medians of what there is time for, on a CPU from one (the large batch of stage 1) to five. All suites take about a
quarter of an hour on two cores. Prints a table and writes a list of objects {suite, case, device, dtype, ours, baseline,
unit, ratio, aim, met}. ratio: how much better ours is than the baseline, above 1 is better (flop_rate: the share of it);
exponents of growth have none and are met up to 0.15 above that of the mathematics.
"""

import argparse
import importlib
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

SUITES = (  # modules with run(device) -> rows
    "stage1_step",
    "flop_rate",
    "stage2_step",
    "feature_cache",
    "generation",
    "reranking",
    "preprocessing",
    "loading",
    "growth",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", required=True, choices=["all", *SUITES])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", help="JSON file for the rows")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: torch sees no GPU here. Use --device cpu.")
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}, "
        f"{processor_name(args.device)}, {torch.get_num_threads()} threads",
        flush=True,
    )
    rows = []
    for suite in SUITES if "all" in args.suite else args.suite:
        start = time.perf_counter()
        found = importlib.import_module(f"benchmarks.{suite}").run(args.device)
        rows += found
        print(f"\n{suite}, {time.perf_counter() - start:.0f} s\n{table(found)}", flush=True)
        if args.output:  # after each suite, so that one that fails does not lose the results before it
            Path(args.output).write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")


def processor_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(rows: list) -> str:
    """Columns as the README shows them, without the suite."""
    lines = ["| case | dtype | ours | baseline | unit | ratio | aim | met |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        met = {None: "", True: "yes", False: "no"}[row.met]
        numbers = [f"{row.ours:.4g}", *("" if x is None else f"{x:.4g}" for x in (row.baseline,))]
        ratios = ["" if x is None else f"{x:.2f}" for x in (row.ratio, row.aim)]
        lines.append("| " + " | ".join([row.case, row.dtype, *numbers, row.unit, *ratios, met]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
