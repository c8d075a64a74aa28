"""The order of visits: every row once an epoch, the same whatever the processes and interruptions, mixed by weight."""

import numpy as np
import pytest

from blip2x_training.data.order import BLOCK, GROUP, BatchOrder, EpochOrder, WeightedOrder, block_shares, visit_order

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
