"""Memory and time of a stage-1 step, plain and in chunks (`itc_chunk_size`), for a mid-size Q-Former on the CPU.

    python -m benchmarks.chunked_contrast --batches 32 64 --chunk 8

Every line is measured in a process of its own: bytes that autograd holds at most, beside parameters and inputs; growth of
the process's peak memory during the first step (gradients of the parameters among it); CPU seconds, with one thread, of
the fastest later step; multiplications (FLOPs) as a share of the plain step's.
"""

import argparse
import functools
import multiprocessing
import resource
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig

from modeling_blip2x import Blip2xConfig, Blip2xForPreTraining
from modeling_blip2x.grad_cache_blip2x import chunked_backward
from tests.helpers.saved_bytes import SavedBytes

POSITIONS, WIDTH, LENGTH, VOCABULARY = 50, 768, 24, 5000
QFORMER = {
    "vocab_size": VOCABULARY,
    "bos_token_id": VOCABULARY - 1,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "max_position_embeddings": 64,
}


def mid_size_model(attention: str = "sdpa") -> Blip2xForPreTraining:
    torch.manual_seed(0)
    # The tower is never run: its features are given, as those of a feature cache.
    tower = CLIPVisionConfig(hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1).to_dict()
    config = Blip2xConfig(
        vision_config=tower,
        qformer_config=QFORMER,
        num_query_tokens=32,
        image_text_hidden_size=256,
        attn_implementation=attention,
    )
    model = Blip2xForPreTraining(config)
    model.freeze_unimodal()
    return model.train()


def random_batch(rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "vision_embeds": torch.randn(rows, POSITIONS, WIDTH, generator=generator),
        "input_ids": torch.randint(5, VOCABULARY - 1, (rows, LENGTH), generator=generator),
        "attention_mask": torch.ones(rows, LENGTH, dtype=torch.long),
    }


def step_of(model: Blip2xForPreTraining, batch: dict[str, torch.Tensor], chunk_size: int | None) -> Callable:
    if chunk_size:
        return functools.partial(chunked_backward, model, chunk_size=chunk_size, negative_seed=0, **batch)
    return lambda: model(**batch, negative_seed=0).loss.backward()


def peak_of_process() -> float:
    """MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(rows: int, chunk_size: int | None, steps: int) -> tuple[float, float, float, int]:
    """(saved MB, growth of the process's peak in MB, CPU seconds a step, FLOPs of matrix products a step)."""
    torch.set_num_threads(1)
    model, batch = mid_size_model(), random_batch(rows)
    step = step_of(model, batch, chunk_size)
    before = peak_of_process()
    step()
    growth = peak_of_process() - before
    seconds = []
    for _ in range(steps):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    with SavedBytes([*model.parameters(), *batch.values()]) as saved:
        step()
    with FlopCounterMode(display=False) as flops:  # which does not know the CPU's fused attention
        step_of(mid_size_model("eager"), batch, chunk_size)()
    return saved.peak / 2**20, growth, min(seconds), flops.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="Steps timed; the fastest counts.")
    args = parser.parse_args()
    print(f"{'batch':>5} {'chunk':>6} {'saved MB':>10} {'peak MB':>9} {'CPU s':>9} {'of plain':>9} {'FLOPs':>6}")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for rows in [args.chunk, *args.batches]:
            plain = None
            for chunk_size in (None, args.chunk):
                saved, growth, seconds, flops = fresh.apply(measure, (rows, chunk_size, args.steps))
                plain = plain or (seconds, flops)
                line = f"{rows:>5} {chunk_size or 'plain':>6} {saved:>10.1f} {growth:>9.1f} {seconds:>9.2f}"
                print(f"{line} {seconds / plain[0]:>9.2f} {flops / plain[1]:>6.2f}", flush=True)


if __name__ == "__main__":
    main()
