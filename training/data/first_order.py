"""The order of runs whose checkpoints have no version of it, for them to go on with: version 1.

It permutes whole epochs in memory, which the paper's 129 million rows do not allow; data sets without shards of up to a
million rows are visited alike in both.
"""

import numpy as np

GROUP = 8  # shards whose rows are shuffled together
Key = tuple[int, int]  # (epoch, row)


class FirstEpochOrder:
    """Key of each position: permutations by (seed, epoch) laid end to end, so no row is dropped or doubled.

    With `shards` (rows,), ascending, an epoch is a permutation of the shards, of which `GROUP` at a time are read and
    their rows permuted: reads stay within a few files. `stream` tells the permutations of several data sets apart.
    """

    def __init__(self, num_rows: int, seed: int, shards: np.ndarray | None = None, stream: int = 0):
        self.num_rows, self.seed, self.shards, self.stream = num_rows, seed, shards, stream
        self.permutations: dict[int, np.ndarray] = {}

    def __call__(self, position: int) -> Key:
        epoch, offset = divmod(position, self.num_rows)
        if epoch not in self.permutations:
            self.permutations = {e: p for e, p in self.permutations.items() if e >= epoch - 1}
            self.permutations[epoch] = self.permutation(epoch)
        return epoch, int(self.permutations[epoch][offset])

    def permutation(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch, self.stream])
        if self.shards is None:
            return rng.permutation(self.num_rows)
        starts = np.flatnonzero(np.diff(self.shards)) + 1
        rows_of_shard = np.split(np.arange(self.num_rows), starts)
        order = rng.permutation(len(rows_of_shard))
        groups = [order[start : start + GROUP] for start in range(0, len(order), GROUP)]
        return np.concatenate([rng.permutation(np.concatenate([rows_of_shard[s] for s in group])) for group in groups])
