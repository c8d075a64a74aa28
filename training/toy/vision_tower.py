"""Vision tower of the embedded default: a small convolutional vision transformer, pre-trained on pictures alone.

Each of its 6 x 6 output cells learns what covers it (shape, colour, size, the way to its centre) and where the cell
lies. Labels cover every colour and shape, the held-out pairs among them, as a large image collection would; captions,
questions and relations play no part. It is a transformers `CvtModel`: convolutions embed the pixels, so that 12,000
pictures suffice, and because nothing in CvT encodes positions, the cell's own place is a target.

    python -m blip2x_training.toy.vision_tower --output_dir vision_tower --seed 0
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CvtConfig, CvtModel, ViTImageProcessorPil

from .scenes import ALL_PAIRS, COLORS, IMAGE_SIZE, RADII, SHAPES, Scene, draw_scene, render

GRID = 6
CELL = IMAGE_SIZE / GRID  # pixels
REACH = 3  # pixels from an outline within which a cell's centre counts as covered
PICTURES = 12000
STEPS, BATCH_SIZE, LEARNING_RATE = 900, 64, 3e-3
STREAM = 11  # keeps the pictures apart from those of the splits


def tower_config() -> CvtConfig:
    return CvtConfig(
        patch_sizes=[7, 3], patch_stride=[4, 2], patch_padding=[3, 1], embed_dim=[32, 64], num_heads=[1, 4], depth=[1, 2],
        mlp_ratio=[2.0, 2.0], attention_drop_rate=[0.0, 0.0], drop_rate=[0.0, 0.0], drop_path_rate=[0.0, 0.0],
        qkv_bias=[True, True], cls_token=[False, False], qkv_projection_method=["dw_bn", "dw_bn"], kernel_qkv=[3, 3],
        padding_kv=[1, 1], stride_kv=[2, 1], padding_q=[1, 1], stride_q=[1, 1],
        hidden_size=64,  # CvtConfig has no such field; what builds on the tower asks for its width
        initializer_range=0.08,  # 0.65 / sqrt(64): transformers' 0.02 is meant for widths near 1000
    )  # fmt: skip


def make_image_processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


class DenseHead(nn.Module):
    """Predictions for each cell; thrown away after pre-training."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.sizes = [1, len(COLORS), len(SHAPES), 1, 2, 2]  # covered, colour, shape, big, way to the centre, own place
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.linear(self.norm(features)).split(self.sizes, dim=-1)


def cell_targets(scenes: list[Scene]) -> np.ndarray:
    """(n, 36, 6) float32: covered, colour index, shape index, big, and x, y from cell to centre in 12 pixels."""
    middle = (np.arange(GRID) + 0.5) * CELL
    grid_x, grid_y = (axis.reshape(-1) for axis in np.meshgrid(middle, middle))
    colors, shapes, sizes = list(COLORS), list(SHAPES), list(RADII)
    targets = np.zeros((len(scenes), GRID * GRID, 6), dtype=np.float32)
    for target, scene in zip(targets, scenes, strict=True):
        distances = np.stack([np.hypot(grid_x - t.x, grid_y - t.y) - t.radius for t in scene.things])
        for index, thing in enumerate(scene.things):
            cells = (distances.argmin(0) == index) & (distances[index] < REACH)
            target[cells, :4] = 1, colors.index(thing.color), shapes.index(thing.shape), sizes.index(thing.size)
            target[cells, 4] = (thing.x - grid_x[cells]) / 12
            target[cells, 5] = (thing.y - grid_y[cells]) / 12
    return targets


def dense_losses(outputs: tuple[torch.Tensor, ...], targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each part's mean loss; colour, shape, size and way count over covered cells only."""
    covered, color, shape, big, way, place = outputs
    on = targets[..., 0] > 0
    index = torch.arange(GRID * GRID)
    own_place = torch.stack([index % GRID, index // GRID], dim=1) / GRID - 0.42  # roughly -0.4 .. 0.4
    return {
        "covered": F.binary_cross_entropy_with_logits(covered[..., 0], targets[..., 0]),
        "color": F.cross_entropy(color[on], targets[..., 1][on].long()),
        "shape": F.cross_entropy(shape[on], targets[..., 2][on].long()),
        "size": F.binary_cross_entropy_with_logits(big[..., 0][on], targets[..., 3][on]),
        "way": 2 * (way[on] - targets[..., 4:6][on]).abs().mean(),
        "place": 4 * (place - own_place).abs().mean(),
    }


def features_of(tower: CvtModel, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 36, 64)"""
    return tower(pixels).last_hidden_state.flatten(2).transpose(1, 2)


@torch.no_grad()
def cell_accuracy(tower: CvtModel, head: DenseHead, pixels: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Share of covered cells whose colour, shape and size come out right."""
    tower.eval()
    outputs = [head(features_of(tower, part)) for part in pixels.split(250)]
    color, shape, big = (torch.cat([output[i] for output in outputs]) for i in (1, 2, 3))
    right = {
        "color": color.argmax(-1) == targets[..., 1],
        "shape": shape.argmax(-1) == targets[..., 2],
        "size": (big[..., 0] > 0) == (targets[..., 3] > 0),
    }
    on = targets[..., 0] > 0
    return {name: value[on].float().mean().item() for name, value in right.items()}


def pretrain_vision(output_dir: str | Path, seed: int, steps: int = STEPS, pictures: int = PICTURES) -> None:
    """Trains the tower and saves it with its image processor and metrics.jsonl."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, STREAM])
    scenes = [draw_scene(rng, ALL_PAIRS) for _ in range(pictures)]
    pixels = np.concatenate([render(scenes[i : i + 500], rng) for i in range(0, pictures, 500)])
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1  # as the image processor does it
    targets = torch.from_numpy(cell_targets(scenes))
    kept_back = max(1, pictures // 24)

    tower, head = CvtModel(tower_config()), DenseHead(64)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    log = []
    for step in range(1, steps + 1):
        rows = torch.randint(kept_back, pictures, (BATCH_SIZE,))
        losses = dense_losses(head(features_of(tower, pixels[rows])), targets[rows])
        loss = sum(losses.values())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps:
            log.append({"step": step, "loss": loss.item(), **{name: part.item() for name, part in losses.items()}})
        if step % 100 == 0 or step == steps:
            print(f"vision tower: step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    accuracy = cell_accuracy(tower, head, pixels[:kept_back], targets[:kept_back])
    print("vision tower, new pictures: " + ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items()))

    output_dir = Path(output_dir)
    tower.eval().save_pretrained(output_dir)
    make_image_processor().save_pretrained(output_dir)
    (output_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pre-train the toy vision tower.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    arguments = parser.parse_args()
    pretrain_vision(arguments.output_dir, arguments.seed, arguments.steps, arguments.pictures)
