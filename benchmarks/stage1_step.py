"""Forward and backward of stage 1 against the plain algorithm of the official code, on the same weights.

Q-Former 12 x 768, 32 queries, features (257, 1408) given as a feature cache gives them, captions of 8 to 16 tokens padded
to the longest. Losses are compared in evaluation mode; time is taken in training mode, dropout included, in turns with
matrix products that tell what the machine can do (see flop_rate.py). On a CPU the large batch is timed once, after a
warm-up.
"""

from dataclasses import dataclass
from functools import cache, partial

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig

from benchmarks.measure import Row, alternating_seconds, faster, square_products
from benchmarks.official_step import official_losses
from modeling_blip2x import Blip2xConfig, Blip2xForPreTraining

POSITIONS, WIDTH, QUERIES, LENGTHS = 257, 1408, 32, (8, 9, 10, 11, 13, 14, 15, 16)
BATCHES = (8, 32)  # multiples of the number of lengths, so that each occurs equally often
FASTER = {("cpu", "float32"): 1.9, ("cpu", "bfloat16"): 3.5}  # aims
FORWARD_FLOPS, COUNTED_TOKENS = 42e9, 12  # aim: FLOPs a pair whose caption has that many tokens
LOSSES = ("loss_itc", "loss_itm", "loss_itg")


@dataclass
class Timing:
    """Seconds of a step, ours and the official algorithm's; FLOP/s of our step and of a large matrix product."""

    ours: float
    official: float
    flop_rate: float
    limit: float


def run(device: str) -> list[Row]:
    """The official code knows no autocast on a CPU, so its float32 is what bfloat16 has to beat there."""
    rows = [flops_row(device)]
    for dtype in dtypes(device):
        for batch in BATCHES:
            timing, in_float32 = timed(device, dtype, batch), timed(device, "float32", batch)
            case = f"forward and backward, batch {batch}"
            compared = [(case, timing.official, FASTER.get((device, dtype)))]
            if dtype == "bfloat16" and device == "cpu":
                compared = [
                    (f"{case}; baseline: float32", in_float32.official, FASTER[device, dtype]),
                    (f"{case}; baseline: bfloat16", timing.official, None),
                ]
            for name, official, aim in compared:
                rows.append(faster("stage1_step", name, device, dtype, timing.ours, official, "s/step", aim))
    return rows


def dtypes(device: str) -> list[str]:
    """float32, and bfloat16 (autocast) where the machine multiplies in it."""
    if device == "cuda":
        return ["float32", "bfloat16"]
    can = torch.cpu.get_capabilities()
    return ["float32", "bfloat16"] if can.get("amx_bf16") or can.get("avx512_bf16") else ["float32"]


@cache  # flop_rate reads the same timings
def timed(device: str, dtype: str, rows: int) -> Timing:
    model, batch = build_model(device), make_batch(device, rows)
    # Not in bfloat16, where rounding differs between the algorithms, and with it the negatives that they draw.
    if dtype == "float32" and rows == min(BATCHES):
        check_losses(model, batch)
    model.train()
    product, product_flops = square_products(device, dtype)
    steps = {name: partial(step, model, losses, batch, dtype) for name, losses in ALGORITHMS.items()}
    repeats = 1 if device == "cpu" and rows > min(BATCHES) else 3
    seconds = alternating_seconds(steps | {"product": product}, device, repeats)
    flops = flops_of_step(device) * rows
    return Timing(seconds["ours"], seconds["official"], flops / seconds["ours"], product_flops / seconds["product"])


def flops_row(device: str) -> Row:
    batch = make_batch(device, 2, (COUNTED_TOKENS,))
    forwards = [lambda model, f=f: f(model, **batch, negative_seed=0) for f in ALGORITHMS.values()]
    ours, official = (count_flops(forward, device) / 2 for forward in forwards)
    case = f"forward a pair of {COUNTED_TOKENS} tokens, aim 42"
    row = faster("stage1_step", case, device, "any", ours / 1e9, official / 1e9, "GFLOP", official / FORWARD_FLOPS)
    return row


@cache
def flops_of_step(device: str) -> float:
    """FLOPs a pair of our forward and backward."""
    batch = make_batch(device, 2, (min(LENGTHS), max(LENGTHS)))  # two captions whose mean length is that of all LENGTHS
    return count_flops(lambda model: step(model, our_losses, batch, "float32"), device) / 2


def count_flops(run, device: str) -> int:
    """FLOPs of matrix products in run(model), with attention written out: the counter does not know a CPU's fused one."""
    model = build_model(device, "eager").eval()
    with FlopCounterMode(display=False) as counter:
        run(model)
    return counter.get_total_flops()


def build_model(device: str, attention: str = "sdpa") -> Blip2xForPreTraining:
    torch.manual_seed(0)
    # The tower is never run: its features are given.
    tower = CLIPVisionConfig(hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=16)
    config = Blip2xConfig(vision_config=tower.to_dict(), num_query_tokens=QUERIES, attn_implementation=attention)
    model = Blip2xForPreTraining(config)
    model.freeze_unimodal()
    return model.to(device)


def make_batch(device: str, rows: int, lengths: tuple[int, ...] = LENGTHS) -> dict[str, torch.Tensor]:
    """Random features, and captions of `lengths` tokens in turn, padded to the longest."""
    generator = torch.Generator().manual_seed(0)
    length_of_row = torch.tensor(lengths).repeat(rows)[:rows]
    mask = (torch.arange(max(lengths)) < length_of_row[:, None]).long()
    input_ids = torch.randint(1000, 30000, mask.shape, generator=generator) * mask
    input_ids[:, 0] = 101  # [CLS]
    features = torch.randn(rows, POSITIONS, WIDTH, generator=generator)
    batch = {"vision_embeds": features, "input_ids": input_ids, "attention_mask": mask}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def our_losses(model: Blip2xForPreTraining, **batch) -> dict[str, torch.Tensor]:
    output = model(**batch)
    return {name: output[name] for name in LOSSES}


ALGORITHMS = {"ours": our_losses, "official": official_losses}


def step(model: Blip2xForPreTraining, losses, batch: dict[str, torch.Tensor], dtype: str) -> None:
    """Gradients are new ones, as after an optimizer's step."""
    device = batch["input_ids"].device.type
    model.zero_grad(set_to_none=True)
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = sum(losses(model, **batch, negative_seed=0).values())
    loss.backward()


def check_losses(model: Blip2xForPreTraining, batch: dict[str, torch.Tensor]) -> None:
    """Print how far the losses are apart, and stop where that is more than 1e-4."""
    model.eval()
    with torch.no_grad():
        ours, official = (losses(model, **batch, negative_seed=0) for losses in ALGORITHMS.values())
    apart = torch.stack([abs(ours[name] - official[name]) for name in LOSSES]).max().item()  # NaN if any loss is NaN
    print(f"stage-1 losses, batch {len(batch['input_ids'])}: at most {apart:.1e} apart", flush=True)
    if not apart <= 1e-4:
        raise RuntimeError(f"The losses are not those of the official algorithm: {ours} and {official}.")
