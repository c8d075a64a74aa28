"""Features of a frozen tower kept on disk by cache_features.py, and whether they belong to a model and its data."""

import hashlib
import json
from pathlib import Path

import datasets
import numpy as np
import torch
from data import CaptionDataset, keep_encoded


def tower_fingerprint(tower: torch.nn.Module, feature_layer: int, image_processor) -> dict[str, str | int]:
    """What the features of an image depend on: weights, layer and preprocessing."""
    weights = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    preprocessing = json.dumps(image_processor.to_dict(), sort_keys=True, default=str)
    return {
        "weights": weights.hexdigest()[:16],
        "vision_feature_layer": feature_layer,
        "preprocessing": hashlib.sha256(preprocessing.encode()).hexdigest()[:16],
    }


def use_feature_cache(folder: str, model: torch.nn.Module, image_processor, splits: dict[str, CaptionDataset]) -> None:
    """Let data sets give cached features instead of images, after checking that they belong to this tower and data."""
    fingerprint = tower_fingerprint(model.shared_model.vision_model, model.config.vision_feature_layer, image_processor)
    for split, dataset in splits.items():
        images = rows_fingerprint(dataset.images, dataset.image_column)
        dataset.use_features(load_features(folder, split, {**fingerprint, "images": images}))


def rows_fingerprint(rows: datasets.Dataset, image_column: str) -> str:
    """Hash of which images the rows show, in order: file name where there is one, else content."""
    digest = hashlib.sha256()
    for row in keep_encoded(rows, image_column).select_columns([image_column]):
        value = row[image_column]
        name = value.get("path") if isinstance(value, dict) else value
        digest.update(Path(name).name.encode() if name else value["bytes"])
    return digest.hexdigest()[:16]


def load_features(folder: str, split: str, fingerprint: dict) -> np.ndarray:
    """Memory map, (rows, N, D) or (rows, V, N, D), of the feature cache of a split.

    Raises ValueError if there is none, or if it was written by other weights, preprocessing or images.
    """
    stem = Path(folder) / split
    try:
        described = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        features = np.load(stem.with_suffix(".npy"), mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--feature_cache {folder} has no whole cache of split {split!r} ({error}). "
            "Write it with cache_features.py."
        ) from error
    differs = [
        f"{key}: cache {described.get(key)!r}, now {value!r}"
        for key, value in fingerprint.items()
        if described.get(key) != value
    ]
    if differs:
        raise ValueError(
            f"--feature_cache {folder}, split {split!r} does not belong to this run ({'; '.join(differs)}). "
            "Write it again with cache_features.py."
        )
    return features
