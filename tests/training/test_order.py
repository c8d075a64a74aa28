"""The order of visits: every row once an epoch, the same whatever the processes and interruptions, mixed by weight."""

import tracemalloc

import numpy as np
import pytest

from blip2x_training.data import order as order_module
from blip2x_training.data.first_order import FirstEpochOrder
from blip2x_training.data.keyed_permutation import KeyedPermutation
from blip2x_training.data.order import BLOCK, GROUP, BatchOrder, EpochOrder, WeightedOrder, block_shares, visit_order
from blip2x_training.engine.checkpoint import order_of

SHARDS = np.repeat(np.arange(20), [7, 1, 12, 5] * 5)  # 125 rows of 20 shards


def visits(order, count: int, start: int = 0) -> list[tuple[int, int]]:
    return [order(position) for position in range(start, start + count)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: EpochOrder(7, seed=1),
        lambda: EpochOrder(len(SHARDS), seed=1, shards=SHARDS),
        lambda: visit_order([30, len(SHARDS)], [None, SHARDS], [3, 1], seed=1),
        lambda: visit_order([30, len(SHARDS)], [None, SHARDS], None, seed=1),
    ],
    ids=["rows", "shards", "weighted", "joined"],
)
def test_order_of_samples_does_not_depend_on_processes_or_interruption(make):
    whole = [key for batch in BatchOrder(make(), 4, 600) for key in batch]
    ranks = [list(BatchOrder(make(), 2, 600, rank=rank, num_processes=2)) for rank in range(2)]
    assert [key for pair in zip(*ranks) for batch in pair for key in batch] == whole
    for seen in (12, 1000, 1396):
        rest = BatchOrder(make(), 4, (2400 - seen) // 4, samples_seen=seen)
        assert [key for batch in rest for key in batch] == whole[seen:]


@pytest.mark.parametrize("shards", [None, SHARDS], ids=["rows", "shards"])
def test_every_row_once_an_epoch_in_another_order(shards):
    order = EpochOrder(125, seed=3, shards=shards)
    epochs = [[row for _, row in visits(order, 125, start)] for start in (0, 125, 250)]
    assert all(sorted(epoch) == list(range(125)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != [row for _, row in visits(EpochOrder(125, 4), 125)]
    assert [epoch for epoch, _ in visits(order, 3, 124)] == [0, 1, 1]


def test_reads_stay_within_a_group_of_shards():
    rows = [row for _, row in visits(EpochOrder(125, seed=0, shards=SHARDS), 125)]
    seen, position = set(), 0
    while position < len(rows):
        group = set()
        while position < len(rows) and (SHARDS[rows[position]] in group or len(group) < GROUP):
            group.add(SHARDS[rows[position]])
            position += 1
        assert not group & seen, "a shard is read in two groups"
        seen |= group
    assert len(seen) == 20
    first = rows[: (np.isin(SHARDS, list({SHARDS[row] for row in rows[:5]}))).sum()]
    assert len({SHARDS[row] for row in first[:12]}) > 2, "the rows of a group are not mixed"


def test_weights_are_proportions_of_every_block():
    order = visit_order([40, 5000], [None, None], [3, 1], seed=2)
    assert isinstance(order, WeightedOrder)
    for start in (0, BLOCK, 7 * BLOCK):
        rows = [row for _, row in visits(order, BLOCK, start)]
        assert sum(row < 40 for row in rows) == 750
    near = [row < 40 for _, row in visits(order, 100)]
    assert 55 < sum(near) < 95, "the data sets are not mixed within a block"
    small = [key for key in visits(order, 2 * BLOCK) if key[1] < 40]
    assert small[0][0] == 0 and small[40][0] == 1  # its own epochs
    assert sorted(row for epoch, row in small if epoch == 5) == list(range(40))
    assert block_shares([1, 1, 1]) == [334, 333, 333] and block_shares([1, 1e-9]) == [999, 1]


def test_without_weights_data_sets_are_visited_by_size():
    plain = visit_order([30, 90], [None, None], None, seed=5)
    assert sorted(row for _, row in visits(plain, 120)) == list(range(120))
    tars = np.repeat(np.arange(10), 1000)
    rows = [row for _, row in visits(visit_order([10_000, 10_000], [None, tars], None, seed=5), 20_000)]
    assert sorted(rows) == list(range(20_000)) and 100 < sum(row < 10_000 for row in rows[:500]) < 400


@pytest.mark.parametrize("count", [*range(1, 40), 257, 1000, 4097])
def test_a_computed_permutation_is_one_and_differs_by_key(count):
    found = [[KeyedPermutation(count, key)(place) for place in range(count)] for key in ((1, 0), (1, 1), (2, 0))]
    assert all(sorted(one) == list(range(count)) for one in found)
    assert count < 10 or found[0] != found[1] != found[2] != found[0]
    with pytest.raises(IndexError):
        KeyedPermutation(count, (1,))(count)


def test_a_computed_permutation_mixes():
    """Neighbours land far from one another, and each part of the rows is spread over all places."""
    count = 100_000
    found = np.array([KeyedPermutation(count, (7,))(place) for place in range(count)])
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.02 and abs(np.corrcoef(found, range(count))[0, 1]) < 0.02
    counted = np.histogram2d(found, np.arange(count), bins=10)[0]
    assert np.abs(counted - 1000).max() < 150  # a deviation is about 30


def test_large_data_sets_are_permuted_without_a_table(monkeypatch):
    monkeypatch.setattr(order_module, "TABLE", 10)
    for shards in (None, SHARDS):
        order = EpochOrder(125, seed=3, shards=shards)
        epochs = [[row for _, row in visits(order, 125, start)] for start in (0, 125)]
        assert all(sorted(epoch) == list(range(125)) for epoch in epochs) and epochs[0] != epochs[1]
        assert [order(position)[1] for position in (130, 3, 249, 0)] == [
            epochs[1][5],
            epochs[0][3],
            epochs[1][124],
            epochs[0][0],
        ]


def test_129_million_rows_in_12_900_shards_take_little_memory():
    """Any position at once; a table would take a gigabyte, and a row of each shard's number another."""
    rows, per_shard = 129_000_000, 10_000
    order = EpochOrder(rows, seed=42)
    order.starts = np.arange(0, rows + 1, per_shard)
    tracemalloc.start()
    found = [order(position) for position in (100_000_000, 128_999_999, 5, rows + 7)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [epoch for epoch, _ in found] == [0, 0, 0, 1] and len({row for _, row in found}) == 4
    assert peak < 50e6
    whole = EpochOrder(rows, seed=42)
    assert 0 <= whole(100_000_000)[1] < rows and whole(100_000_000) != whole(100_000_001)


def test_an_order_goes_on_with_the_version_that_it_began_with():
    assert order_of({"step": 0}) == 2 and order_of({"step": 4}) == 1 and order_of({"step": 4, "order": 2}) == 2
    shards = np.repeat(np.arange(30), 5)
    old = visit_order([150], [shards], None, seed=1, version=1)
    assert isinstance(old, FirstEpochOrder)
    assert visits(old, 300) == visits(FirstEpochOrder(150, 1, shards), 300)
    assert visits(old, 300) != visits(visit_order([150], [shards], None, seed=1), 300)
    assert visits(FirstEpochOrder(150, 1), 300) == visits(EpochOrder(150, 1), 300), "without shards both are one"
