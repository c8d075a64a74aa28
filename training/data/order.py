"""The order in which training visits rows: pure functions of the seed and the position.

No worker or process holds a state, so a run resumes from the number of samples seen, and the order of samples does not
depend on the number of processes.
"""

from collections.abc import Callable, Sequence

import numpy as np

GROUP = 8  # shards whose rows are shuffled together
PSEUDO_SHARD = 1000  # rows of a data set without shards that count as one beside data sets with shards
BLOCK = 1000  # positions in which weighted data sets have exactly their shares
Key = tuple[int, int]  # (epoch, row)


class EpochOrder:
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


class WeightedOrder:
    """Key of each position where several data sets are visited in proportion to `weights`, whatever their sizes.

    Each block of `BLOCK` positions holds each data set's share, rounded, in an order by (seed, block); the visits of a data
    set follow its own epochs, which are those of the keys. Rows count through the data sets.
    """

    def __init__(self, orders: Sequence[EpochOrder], weights: Sequence[float], seed: int):
        self.orders, self.seed, self.block, self.places = orders, seed, None, None
        self.first_rows = np.cumsum([0, *(order.num_rows for order in orders)])
        self.shares = block_shares(weights)

    def __call__(self, position: int) -> Key:
        block, offset = divmod(position, BLOCK)
        if block != self.block:
            self.block, self.places = block, self.places_of(block)
        chosen, visit = self.places[offset]
        epoch, row = self.orders[chosen](visit)
        return epoch, row + int(self.first_rows[chosen])

    def places_of(self, block: int) -> list[tuple[int, int]]:
        """(data set, number of its visit) of each position of a block."""
        rng = np.random.default_rng([self.seed, block, len(self.orders), 1])  # no stream of an EpochOrder's
        drawn = rng.permutation(np.repeat(np.arange(len(self.shares)), self.shares))
        visits = [block * share for share in self.shares]
        places = []
        for chosen in drawn.tolist():
            places.append((chosen, visits[chosen]))
            visits[chosen] += 1
        return places


def block_shares(weights: Sequence[float]) -> list[int]:
    """How many of `BLOCK` positions each data set gets: its share by the largest remainders, and at least one."""
    exact = np.asarray(weights, dtype=float) / sum(weights) * BLOCK
    shares = np.maximum(1, np.floor(exact)).astype(int)
    while shares.sum() < BLOCK:
        shares[np.argmax(exact - shares)] += 1
    while shares.sum() > BLOCK:
        shares[np.argmax(np.where(shares > 1, shares - exact, -np.inf))] -= 1
    return shares.tolist()


def visit_order(
    sizes: Sequence[int], shards: Sequence[np.ndarray | None], weights: Sequence[float] | None, seed: int
) -> EpochOrder | WeightedOrder:
    """The order for data sets of some sizes and shards: one after another as one, or by weight where there are weights."""
    if weights:
        orders = [EpochOrder(size, seed, shards[part], part) for part, size in enumerate(sizes)]
        return WeightedOrder(orders, weights, seed)
    if all(part is None for part in shards):
        return EpochOrder(sum(sizes), seed)
    joined, first = [], 0
    for size, part in zip(sizes, shards):
        part = np.arange(size) // PSEUDO_SHARD if part is None else part
        joined.append(part + first)
        first = int(joined[-1][-1]) + 1
    return EpochOrder(sum(sizes), seed, np.concatenate(joined))


class BatchOrder:
    """Batch sampler: the keys of this process's micro-batches, from a given sample to the last step.

    The positions of `visits` are cut into global batches, so no batch is short and the order of samples is the same for
    any number of processes.
    """

    def __init__(
        self,
        visits: Callable[[int], Key],
        batch_size: int,
        num_batches: int,
        *,
        rank: int = 0,
        num_processes: int = 1,
        samples_seen: int = 0,
    ):
        self.visits, self.batch_size, self.num_batches = visits, batch_size, num_batches
        self.rank, self.num_processes, self.samples_seen = rank, num_processes, samples_seen

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self):
        for batch in range(self.num_batches):
            start = self.samples_seen + (batch * self.num_processes + self.rank) * self.batch_size
            yield [self.visits(position) for position in range(start, start + self.batch_size)]
