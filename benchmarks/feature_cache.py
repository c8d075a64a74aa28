"""A stage-1 step with and without the feature cache, and what writing the cache costs.

    python benchmarks/feature_cache.py [--case mobilenet_v2 vit_l] [--bf16] [--output FILE.json]

Random weights of real sizes, JPEG files of Flickr8k's size made of noise, no network. Both kinds of step are those of
training: rows through the data loader (without a cache: reading, decoding, resizing, tower; with it: reading features),
collator, three losses, backward, clipping, AdamW. Same weights, same rows in the same order; steps alternate, so that a
busy machine is busy for both; CPU time is what this process took of all its threads. Medians after warm-up. Losses of the first step are compared first.
"""

import argparse
import json
import sys
from pathlib import Path

from transformers import CLIPVisionConfig, MobileNetV2Config

ROOT = Path(__file__).parent.parent


CASES = {  # arguments of cached_step.measure
    # 49 positions x 1280; the Q-Former of the Flickr8k recipe
    "mobilenet_v2": {
        "tower_config": MobileNetV2Config(),
        "feature_layer": -1,
        "qformer": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
        "num_query_tokens": 8,
        "batch_size": 32,
    },
    # 257 positions x 1024; the paper's Q-Former
    "vit_l": {
        "tower_config": CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=224,
            patch_size=14,
        ),
        "feature_layer": -2,
        "qformer": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
        "num_query_tokens": 32,
        "batch_size": 8,
    },
}


def show(result: dict, batch_size: int, steps: int, dtype: str) -> None:
    plain, cached, writing = result["without"], result["with"], result["writing"]
    per_image = writing["seconds"] / writing["images"]
    # A CPU's time does not count what else the machine does; a GPU's work is none of it.
    writing_time, step_time = ("busy", "busy") if result["device"] == "cpu" else ("seconds", "step")
    saved = (plain[step_time] - cached[step_time]) / batch_size
    pays_after = writing[writing_time] / writing["images"] / saved
    print(
        f"\n{result['case']}, {result['device']}, {dtype}, batch {batch_size}, medians of {steps} alternating steps\n"
        f"  step without cache   {plain['step']:8.3f} s, of which reading and preprocessing images {plain['data']:.3f} s\n"
        f"  step with cache      {cached['step']:8.3f} s, of which reading features {cached['data']:.3f} s\n"
        f"  ratio                {plain['step'] / cached['step']:8.2f}\n"
        f"  CPU time             {plain['busy']:8.3f} s without, {cached['busy']:.3f} s with, ratio "
        f"{plain['busy'] / cached['busy']:.2f}\n"
        f"  loss, same batch     {result['losses']['without']:.6f} without, {result['losses']['with']:.6f} with\n"
        f"  writing              {per_image:8.3f} s and {writing['bytes'] / writing['images'] / 1e3:.1f} kB an image "
        f"(float16; {writing['images']} images in {writing['seconds']:.1f} s, "
        f"{writing['busy']:.1f} s of CPU time)\n"
        f"  pays after           {pays_after:8.2f} epochs"
    )


def run(cases: list[str], steps: int = 5, warmup: int = 2, bf16: bool = False) -> list[dict]:
    """Prints each case; returns one object a case, step times in seconds."""
    sys.path[:0] = [str(ROOT), str(ROOT / "training")]
    from cached_step import measure

    dtype, rows = "bfloat16 autocast" if bf16 else "float32", []
    for name in cases:
        result = {"case": name} | measure(**CASES[name], steps=steps, warmup=warmup, bf16=bf16)
        show(result, CASES[name]["batch_size"], steps, dtype)
        ours, baseline = result["with"]["step"], result["without"]["step"]
        rows.append({"suite": "feature_cache", "case": name, "device": result["device"], "dtype": dtype})
        rows[-1] |= {"ours": ours, "baseline": baseline, "unit": "s/step", "ratio": baseline / ours}
        rows[-1] |= {"aim": None, "met": None}  # no aim was set for it
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each kind before them")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, as --bf16 in training")
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args()
    rows = run(args.case, args.steps, args.warmup, args.bf16)
    if args.output:
        Path(args.output).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
