"""Fingerprints of weights, whole or quick, and what differs between two descriptions of a run."""

import hashlib
from collections.abc import Iterable

import torch

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by width in bytes
SAMPLE = 1024  # elements of each tensor that are hashed


def weights_fingerprint(module: torch.nn.Module) -> str:
    """Hash of all parameters and buffers with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def tensors_mark(tensors: Iterable[torch.Tensor]) -> str:
    """Mark of many weights at the speed of memory: of each tensor its shape, the sum of its bits as integers, which any
    single change moves, and evenly spaced elements, which tell an order from another."""
    digest = hashlib.sha256()
    for tensor in tensors:
        bits = tensor.detach().contiguous().flatten().view(INTEGERS[tensor.element_size()])
        sample = bits[:: max(1, len(bits) // SAMPLE)][:SAMPLE].cpu().contiguous()
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} {bits.sum(dtype=torch.int64).item()}".encode())
        digest.update(sample.numpy())
    return digest.hexdigest()[:16]


def differences(cached: dict, wanted: dict) -> str:
    """What a description of what is there says otherwise than wanted; empty where they agree."""
    return "; ".join(
        f"{key} was {cached.get(key)!r}, is now {value!r}" for key, value in wanted.items() if cached.get(key) != value
    )
