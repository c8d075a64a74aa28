"""Fingerprints of weights, whole or quick, and what differs between two descriptions of a run."""

import hashlib
from collections.abc import Iterable

import torch

SAMPLE = 1024  # bytes of each tensor that are hashed


def weights_fingerprint(module: torch.nn.Module) -> str:
    """Hash of all parameters and buffers with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def tensors_mark(tensors: Iterable[torch.Tensor]) -> str:
    """Mark of many weights at the speed of memory: of each tensor its shape, the sum of its bytes as 64-bit integers, which
    any single change moves, and evenly spaced bytes, which tell an order from another."""
    digest = hashlib.sha256()
    for tensor in tensors:
        content = tensor.detach().contiguous().flatten().view(torch.uint8)
        content = content.clone() if content.storage_offset() % 8 else content
        whole = len(content) // 8 * 8
        total = content[:whole].view(torch.int64).sum().item()
        spaced = content[:: max(1, len(content) // SAMPLE)]
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} {total}".encode())
        digest.update(torch.cat([spaced, content[whole:]]).cpu().numpy())
    return digest.hexdigest()[:16]


def differences(cached: dict, wanted: dict) -> str:
    """What a description of what is there says otherwise than wanted; empty where they agree."""
    return "; ".join(
        f"{key} was {cached.get(key)!r}, is now {value!r}" for key, value in wanted.items() if cached.get(key) != value
    )
