"""Bytes that autograd holds for a backward."""

from collections import Counter
from collections.abc import Iterable

import torch


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that graphs built inside hold for their backward: `now`, and `peak`.

    A tensor that several operations save counts once; tensors in the memory of `given` (parameters, inputs) do not count.
    """

    def __init__(self, given: Iterable[torch.Tensor] = ()):
        super().__init__(self._pack, lambda held: held.tensor)
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.holders: Counter = Counter()
        self.now = self.peak = 0

    def __enter__(self) -> "SavedBytes":
        super().__enter__()
        return self

    def _pack(self, tensor: torch.Tensor) -> "Held":
        return Held(self, tensor.detach())

    def change(self, key: tuple[int, int], by: int) -> None:
        before = self.holders[key] > 0
        self.holders[key] += by
        self.now += ((self.holders[key] > 0) - before) * key[1]
        self.peak = max(self.peak, self.now)


class Held:
    """A saved tensor, which autograd lets go of when it no longer needs it."""

    def __init__(self, meter: SavedBytes, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        size = min(tensor.numel() * tensor.element_size(), storage.nbytes())  # an expanded tensor is a small one
        self.meter, self.tensor = meter, tensor
        self.key = (tensor.data_ptr(), 0 if storage.data_ptr() in meter.given else size)
        meter.change(self.key, 1)

    def __del__(self):
        self.meter.change(self.key, -1)
