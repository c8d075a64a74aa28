"""A stage-1 step with and without the feature cache, and what writing the cache costs.

Random weights of real sizes, JPEG files of Flickr8k's size made of noise. Both kinds of step are those of training: rows
through the data loader (without a cache: reading, decoding, resizing, tower; with it: reading features), collator, three
losses, backward, clipping, AdamW. Same weights, same rows in the same order; steps alternate, so that a busy machine is
busy for both. Medians after warm-up. Losses of the first step are compared first.
"""

from transformers import CLIPVisionConfig, MobileNetV2Config

from benchmarks.cached_step import measure
from benchmarks.measure import Row, faster
from benchmarks.stage1_step import dtypes

CASES = {  # arguments of cached_step.measure
    # 257 positions x 1024; the paper's Q-Former
    "ViT-L, Q-Former 12 x 768": {
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
    # 49 positions x 1280; the Q-Former of the Flickr8k recipe
    "MobileNetV2, Q-Former 6 x 384": {
        "tower_config": MobileNetV2Config(),
        "feature_layer": -1,
        "qformer": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
        "num_query_tokens": 8,
        "batch_size": 32,
    },
}
AIMS = {"ViT-L, Q-Former 12 x 768": 3.0}


def run(device: str) -> list[Row]:
    steps, rows = 10 if device == "cuda" else 2, []
    dtype = dtypes(device)[-1]  # the machine's fastest, as one would train
    for name, case in CASES.items():
        result = measure(**case, device=device, steps=steps, warmup=1, bf16=dtype == "bfloat16")
        show(name, result, case["batch_size"])
        with_cache, without = result["with"]["step"], result["without"]["step"]
        rows.append(faster("feature_cache", name, device, dtype, with_cache, without, "s/step", AIMS.get(name)))
    return rows


def show(name: str, result: dict, batch_size: int) -> None:
    plain, cached, writing = result["without"], result["with"], result["writing"]
    per_image = writing["seconds"] / writing["images"]
    saved = (plain["step"] - cached["step"]) / batch_size
    pays = f"pays after           {per_image / saved:.2f} epochs" if saved > 0 else "saves nothing here"
    print(
        f"{name}, batch {batch_size}: reading images takes {plain['data']:.3f} s of the step, reading features "
        f"{cached['data']:.3f} s\n"
        f"  loss, same batch     {result['losses']['without']:.6f} without, {result['losses']['with']:.6f} with\n"
        f"  writing              {per_image:.3f} s and {writing['bytes'] / writing['images'] / 1e3:.1f} kB an image "
        f"(float16)\n"
        f"  {pays}",
        flush=True,
    )
