"""Fingerprints of weights, and what differs between two descriptions of a run."""

import hashlib

import torch


def weights_fingerprint(module: torch.nn.Module) -> str:
    """Hash of all parameters and buffers with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def differences(cached: dict, wanted: dict) -> str:
    """What a description of what is there says otherwise than wanted; empty where they agree."""
    return "; ".join(
        f"{key} was {cached.get(key)!r}, is now {value!r}" for key, value in wanted.items() if cached.get(key) != value
    )
