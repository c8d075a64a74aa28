"""The order in which training visits rows: pure functions of the seed and the position.

No worker or process holds a state, so a run resumes from the number of samples seen, and the order of samples does not
depend on the number of processes.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .first_order import FirstEpochOrder
from .keyed_permutation import KeyedPermutation

VERSION = 2  # of the order, in the state of each checkpoint
TABLE = 2**20  # rows of a permutation that is held, which takes 40 MB
GROUP = 8  # shards whose rows are shuffled together
PSEUDO_SHARD = 1000  # rows of a data set without shards that count as one beside data sets with shards
BLOCK = 1000  # positions in which weighted data sets have exactly their shares
Key = tuple[int, int]  # (epoch, row)


@dataclass(frozen=True)
class ShardStarts:
    """Shards by their first rows, and the end, (shards + 1,): where a number for each row would be too much to hold."""

    starts: np.ndarray


class EpochOrder:
    """Key of each position: permutations by (seed, epoch) laid end to end, so no row is dropped or doubled.

    With `shards`, of which each row has a number (rows,), ascending, an epoch is a permutation of the shards, of which `GROUP` at a time are read and
    their rows permuted: reads stay within a few files. `stream` tells the permutations of several data sets apart.

    Any position is found in milliseconds: of an epoch the permuted shards are in memory, and of the group that is read the
    permuted rows, which are computed one by one where they are more than TABLE.
    """

    def __init__(self, num_rows: int, seed: int, shards: np.ndarray | ShardStarts | None = None, stream: int = 0):
        self.num_rows, self.seed, self.stream = num_rows, seed, stream
        self.starts = starts_of(num_rows, shards, num_rows)
        self.epochs: dict[int, Epoch] = {}

    def __call__(self, position: int) -> Key:
        epoch, offset = divmod(position, self.num_rows)
        if epoch not in self.epochs:
            self.epochs = {number: kept for number, kept in self.epochs.items() if number >= epoch - 1}
            self.epochs[epoch] = Epoch(self.starts, (self.seed, epoch, self.stream))
        return epoch, self.epochs[epoch].row(offset)


class Epoch:
    """One pass: shards of which `starts` are the first rows, and the end, in an order by `key`."""

    def __init__(self, starts: np.ndarray, key: tuple[int, ...]):
        self.starts, self.key = starts, key
        count = len(starts) - 1
        self.shards = np.random.default_rng(key).permutation(count) if count > 1 else np.zeros(1, int)
        sizes = np.diff(starts)[self.shards]
        self.ends = np.cumsum(np.add.reduceat(sizes, np.arange(0, count, GROUP)))  # of each group, in visits
        self.group, self.permutation, self.inside = -1, None, None

    def row(self, offset: int) -> int:
        group = int(np.searchsorted(self.ends, offset, side="right"))
        if group != self.group:
            self.read(group)
        place = self.permutation(offset - (int(self.ends[group - 1]) if group else 0))
        shard = bisect_right(self.inside, place) - 1
        return int(self.starts[self.shards[group * GROUP + shard]]) + place - self.inside[shard]

    def read(self, group: int) -> None:
        """Permute the rows of a group; `inside` are the places at which its shards begin."""
        shards = self.shards[group * GROUP : (group + 1) * GROUP]
        self.inside = np.cumsum([0, *np.diff(self.starts)[shards]]).tolist()
        # Without shards there is one group, and its key is the epoch's.
        key = self.key if len(self.shards) == 1 else (*self.key, group)
        self.group, self.permutation = group, permutation_of(self.inside.pop(), key)


def starts_of(num_rows: int, shards: np.ndarray | ShardStarts | None, pseudo: int = PSEUDO_SHARD) -> np.ndarray:
    """The first row of each shard, and the end; without shards `pseudo` rows count as one."""
    if isinstance(shards, ShardStarts):
        return np.unique(shards.starts)  # without those that hold nothing
    firsts = np.arange(0, num_rows, pseudo)[1:] if shards is None else np.flatnonzero(np.diff(shards)) + 1
    return np.array([0, *firsts, num_rows])


def permutation_of(count: int, key: tuple[int, ...]) -> Callable[[int], int]:
    """A permutation of range(count): a table, or computed where that would be large."""
    if count > TABLE:
        return KeyedPermutation(count, key)
    return np.random.default_rng(key).permutation(count).tolist().__getitem__


class WeightedOrder:
    """Key of each position where several data sets are visited in proportion to `weights`, whatever their sizes.

    Each block of `BLOCK` positions holds each data set's share, rounded, in an order by (seed, block); the visits of a data
    set follow its own epochs, which are those of the keys. Rows count through the data sets.
    """

    def __init__(self, orders: Sequence[EpochOrder | FirstEpochOrder], weights: Sequence[float], seed: int):
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
    sizes: Sequence[int],
    shards: Sequence[np.ndarray | ShardStarts | None],
    weights: Sequence[float] | None,
    seed: int,
    version: int = VERSION,
) -> EpochOrder | FirstEpochOrder | WeightedOrder:
    """The order for data sets of some sizes and shards: one after another as one, or by weight where there are weights.

    version: that of the run; one that began with version 1 goes on with it, so that it visits what is left.
    """
    kind = FirstEpochOrder if version == 1 else EpochOrder
    if version == 1:  # which knows shards by the number of each row
        shards = [part if part is None else numbers_of(starts_of(size, part)) for size, part in zip(sizes, shards)]
    if weights:
        orders = [kind(size, seed, shards[part], part) for part, size in enumerate(sizes)]
        return WeightedOrder(orders, weights, seed)
    if all(part is None for part in shards):
        return kind(sum(sizes), seed)
    firsts = np.cumsum([0, *sizes])
    starts = [starts_of(size, part)[:-1] + first for size, part, first in zip(sizes, shards, firsts)]
    joined = np.concatenate([*starts, firsts[-1:]])
    return kind(sum(sizes), seed, numbers_of(joined) if version == 1 else ShardStarts(joined))


def numbers_of(starts: np.ndarray) -> np.ndarray:
    """The number of its shard for each row."""
    return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


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
        prefetcher=None,
    ):
        """prefetcher: told of each position, and that there are no more: see shard_cache.py."""
        self.prefetcher = prefetcher
        self.visits, self.batch_size, self.num_batches = visits, batch_size, num_batches
        self.rank, self.num_processes, self.samples_seen = rank, num_processes, samples_seen

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self):
        for batch in range(self.num_batches):
            start = self.samples_seen + (batch * self.num_processes + self.rank) * self.batch_size
            if self.prefetcher is not None:
                self.prefetcher.advance(start)
            yield [self.visits(position) for position in range(start, start + self.batch_size)]
        if self.prefetcher is not None:
            self.prefetcher.stop()
