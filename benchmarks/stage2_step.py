"""Forward and backward of stage 2 against transformers' Blip2ForConditionalGeneration, on the same weights.

Sizes: ViT-B/16 at 224 as BLIP-2's own tower, Q-Former 12 x 768 with 32 queries, OPT-125m, all random; captions of 8 to 16
tokens padded to the longest; tower and language model frozen in both, and in ours
held in bfloat16 under its autocast, as the training scripts do. transformers trains the usual way: its model, given
pixels, ids, mask and labels, and backward of its loss. Losses are compared without dropout. Peak memory, weights and
gradients included, is that of a process of its own for each: growth of its resident memory, or what torch allocated on a
GPU.
"""

import multiprocessing
from functools import partial
from pathlib import Path

import torch
from transformers import Blip2VisionConfig, OPTConfig

from benchmarks.measure import Row, alternating_seconds, faster
from benchmarks.stage1_step import dtypes
from blip2x_training.models.frozen_dtype import hold_frozen
from modeling_blip2x import Blip2xConfig, Blip2xForConditionalGeneration
from modeling_blip2x.convert_to_blip2x import export_transformers
from modeling_blip2x.weight_files_blip2x import Weight

ROWS, QUERIES, IMAGE_TOKEN, PAD = 16, 32, 50265, 1
LENGTHS = (8, 9, 10, 11, 13, 14, 15, 16)
FASTER, SMALLER = 1.3, 1 / 0.75  # aims


def run(device: str) -> list[Row]:
    rows = []
    for dtype in dtypes(device):
        ours, theirs, batch = our_model("float32").to(device), their_model(dtype).to(device), make_batch(device)
        copy_weights(ours, theirs)
        hold_frozen(ours, None, dtype == "bfloat16", features_cached=False)
        if dtype == "float32":
            check_losses(ours, theirs, batch)
        steps = {
            name: partial(step, model.train(), batch, dtype) for name, model in (("ours", ours), ("theirs", theirs))
        }
        steps["cached"] = partial(step, ours, with_features(ours, batch), dtype)
        seconds = alternating_seconds(steps, device, repeats=10 if device == "cuda" else 2)
        del steps, ours, theirs
        case = f"stage-2 step, batch {ROWS}"
        for name, what in (("ours", case), ("cached", f"{case}, ours with a feature cache")):
            rows.append(faster("stage2_step", what, device, dtype, seconds[name], seconds["theirs"], "s/step", FASTER))
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
            peaks = [fresh.apply(peak_memory, (build, device, dtype)) / 1e9 for build in (our_model, their_model)]
        rows.append(faster("stage2_step", f"{case}, peak memory", device, dtype, *peaks, "GB", SMALLER))
    return rows


def config() -> Blip2xConfig:
    language_model = OPTConfig(
        vocab_size=IMAGE_TOKEN + 7,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        ffn_dim=3072,
        word_embed_proj_dim=768,
    )
    tower = Blip2VisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16
    )
    return Blip2xConfig(
        vision_config=tower.to_dict(),
        text_config=language_model.to_dict(),
        qformer_config={"use_qformer_text_input": False},
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
        vision_layer_norm_eps=tower.layer_norm_eps,
    )


def our_model(dtype: str) -> Blip2xForConditionalGeneration:
    torch.manual_seed(0)
    model = Blip2xForConditionalGeneration(config())
    model.freeze_unimodal()
    hold_frozen(model, None, dtype == "bfloat16", features_cached=False)
    return model


def their_model(dtype: str) -> torch.nn.Module:
    their_class, their_config, _, _ = export_transformers(config(), {})
    model = their_class(their_config)
    for part in (model.vision_model, model.language_model):
        part.requires_grad_(False)
    return model


def copy_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    *_, exported, _ = export_transformers(ours.config, {n: Weight.of(t) for n, t in ours.state_dict().items()})
    theirs.load_state_dict({name: weight.read() for name, weight in exported.items()})


def make_batch(device: str) -> dict[str, torch.Tensor]:
    """What both processors give for a caption without a prompt: image tokens, BOS, text; padding on the right."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(LENGTHS).repeat(ROWS)[:ROWS, None]
    real = torch.arange(max(LENGTHS)) < lengths
    text = torch.randint(100, 50000, real.shape, generator=generator).masked_fill(~real, PAD)
    text[:, 0] = 2  # BOS of OPT
    image = torch.full((ROWS, QUERIES), IMAGE_TOKEN)
    labels = text.masked_fill(~real, -100)
    labels[:, 0] = -100
    batch = {
        "pixel_values": torch.randn(ROWS, 3, 224, 224, generator=generator),
        "input_ids": torch.cat([image, text], dim=1),
        "attention_mask": torch.cat([torch.ones_like(image), real.long()], dim=1),
        "labels": torch.cat([torch.full_like(image, -100), labels], dim=1),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
def with_features(model: Blip2xForConditionalGeneration, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch as a feature cache gives it: what the frozen tower makes of the pixels in their place."""
    others = {name: value for name, value in batch.items() if name != "pixel_values"}
    return others | {"vision_embeds": model.shared_model.get_vision_embeds(batch["pixel_values"])}


def step(model: torch.nn.Module, batch: dict[str, torch.Tensor], dtype: str) -> None:
    model.zero_grad(set_to_none=True)
    with torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model(**batch).loss
    loss.backward()


@torch.no_grad()
def check_losses(ours: torch.nn.Module, theirs: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """Print how far the losses are apart, and stop where that is more than 1e-4."""
    losses = [model.eval()(**batch).loss.item() for model in (ours, theirs)]
    print(f"stage-2 losses: {losses[0]:.6f}, transformers {losses[1]:.6f}", flush=True)
    if not abs(losses[0] - losses[1]) <= 1e-4:
        raise RuntimeError("The losses of the two models differ.")


def peak_memory(build, device: str, dtype: str) -> int:
    """Bytes of model, gradients and two steps at their highest."""
    batch, before = make_batch(device), resident_peak()
    model = build(dtype).to(device).train()
    for _ in range(2):
        step(model, batch, dtype)
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident_peak() - before


def resident_peak() -> int:
    """Bytes. Not ru_maxrss: a process starts with that of the one that started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
