"""How time and memory of the stage-1 step grow with batch, queries, image tokens and ranks, as fitted exponents.

A smaller Q-Former (2 layers of 128, 2 heads, features of 128) so that the largest sizes fit; captions of 12 tokens; no
dropout; float32. Sizes not varied: batch 32, 32 queries, 257 image tokens. Memory is what autograd holds at most for the
backward, beside parameters and inputs. An exponent is the slope of a line fitted to the logarithms of all sizes, which take
turns; the row's baseline is that of the mathematics: of the FLOPs counted for time, 1 for memory, for fused attention keeps
no matrix of scores. Ranks: gloo processes with one thread each and the usual batch a rank, so time of a step should stay:
exponent 0 where the machine has as many idle cores.
"""

import math
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig

from benchmarks.measure import Row, alternating_seconds
from modeling_blip2x import Blip2xConfig, Blip2xForPreTraining
from tests.helpers.saved_bytes import SavedBytes

WIDTH, HEADS, TOKENS, VOCABULARY = 128, 2, 12, 5000
USUAL = {"batch": 32, "queries": 32, "image tokens": 257}
SIZES = {"batch": (8, 32, 128, 256), "queries": (8, 32, 64, 128), "image tokens": (49, 257, 577, 1025)}
RANKS = (1, 2)
SLACK = 0.15  # of an exponent: caches and noise


def run(device: str) -> list[Row]:
    rows = []
    for varied, sizes in SIZES.items():
        seconds, saved, flops = measured(device, varied)
        print(f"{varied:>12} {'s/step':>9} {'saved MB':>9} {'GFLOP':>9}")
        for size, time, memory, products in zip(sizes, seconds, saved, flops):
            print(f"{size:>12} {time:>9.4f} {memory / 2**20:>9.1f} {products / 1e9:>9.1f}")
        time, memory, products = (exponent(sizes, values) for values in (seconds, saved, flops))
        print(f"{'exponent':>12} {time:>9.2f} {memory:>9.2f} {products:>9.2f}", flush=True)
        case = f"{varied} {sizes[0]} to {sizes[-1]}"
        rows += [row(f"{case}, time", device, time, products), row(f"{case}, memory", device, memory, 1.0)]
    if device == "cpu":
        seconds = [seconds_of_ranks(ranks) for ranks in RANKS]
        print(f"{'ranks':>12} {'s/step':>9}\n" + "\n".join(f"{n:>12} {s:>9.4f}" for n, s in zip(RANKS, seconds)))
        rows.append(row("ranks 1 to 2, 32 pairs each, time", device, exponent(RANKS, seconds), 0.0))
    return rows


def row(case: str, device: str, ours: float, mathematics: float) -> Row:
    met = ours <= mathematics + SLACK
    return Row("growth", case, device, "float32", ours, mathematics, "exponent", None, None, met)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    return statistics.linear_regression(*([math.log(x) for x in xs] for xs in (sizes, values))).slope


def measured(device: str, varied: str) -> tuple[list[float], list[int], list[int]]:
    """Seconds, saved bytes and FLOPs of a step at each of the sizes."""
    steps, saved, flops = {}, [], []
    for size in SIZES[varied]:
        shape = USUAL | {varied: size}
        data = make_batch(device, shape["batch"], shape["image tokens"])
        model = small_model(shape["queries"]).to(device)
        steps[str(size)] = partial(step, model, data)
        with SavedBytes([*model.parameters(), *data.values()]) as held:
            step(model, data)
        with FlopCounterMode(display=False) as counter:  # which does not know a CPU's fused attention
            step(small_model(shape["queries"], "eager").to(device), data)
        saved.append(held.peak)
        flops.append(counter.get_total_flops())
    seconds = alternating_seconds(steps, device, repeats=3, warmup=0)
    return list(seconds.values()), saved, flops


def small_model(queries: int, attention: str = "sdpa") -> Blip2xForPreTraining:
    torch.manual_seed(0)
    # The tower is never run: its features are given.
    tower = CLIPVisionConfig(hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=HEADS)
    qformer = {
        "vocab_size": VOCABULARY,
        "bos_token_id": VOCABULARY - 1,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * WIDTH,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config = Blip2xConfig(
        vision_config=tower.to_dict(),
        qformer_config=qformer,
        num_query_tokens=queries,
        attn_implementation=attention,
    )
    model = Blip2xForPreTraining(config)
    model.freeze_unimodal()
    return model


def make_batch(device: str, rows: int, image_tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "vision_embeds": torch.randn(rows, image_tokens, WIDTH, generator=generator).to(device),
        "input_ids": torch.randint(5, VOCABULARY - 1, (rows, TOKENS), generator=generator).to(device),
    }


def step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    model.zero_grad(set_to_none=True)
    model(**batch, negative_seed=0).loss.backward()


def seconds_of_ranks(ranks: int) -> float:
    """Seconds of a step of 32 pairs a rank, gradients averaged by DDP; of the first rank."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run_rank, args=(folder, ranks), nprocs=ranks)
        return float(Path(folder, "seconds").read_text())


def run_rank(rank: int, folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    model = DistributedDataParallel(small_model(USUAL["queries"]))
    batch = make_batch("cpu", USUAL["batch"], USUAL["image tokens"])
    seconds = alternating_seconds({"step": partial(step, model, batch)}, "cpu", repeats=5)["step"]
    if rank == 0:
        Path(folder, "seconds").write_text(str(seconds))
    dist.destroy_process_group()
