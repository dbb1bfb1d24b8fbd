"""The collectives of a tensor-parallel group, on two real ranks and on one."""

from __future__ import annotations

from collections.abc import Iterator

import collectives
import pytest
import torch
from ranks import RankPool

from rayllm.distributed.groups import TensorParallel


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


def test_one_rank_needs_no_group() -> None:
    alone = TensorParallel()
    x = torch.arange(6.0).view(2, 3)
    assert alone.all_reduce(x) is x
    assert alone.all_gather_last(x) is x
    assert alone.shard(7, "heads") == range(7)


def test_all_reduce_sums_in_place_on_every_rank(two_ranks: RankPool) -> None:
    assert two_ranks.run(collectives.reduce_ranks) == [([3.0, 3.0], True)] * 2


def test_all_gather_joins_the_last_dimension_in_order_of_rank(two_ranks: RankPool) -> None:
    expected = [[0.0, 1.0, 100.0, 101.0], [2.0, 3.0, 102.0, 103.0]]
    assert two_ranks.run(collectives.gather_ranks) == [expected, expected]


def test_shards_are_contiguous_and_an_uneven_split_is_refused() -> None:
    assert TensorParallel(1, 2).shard(6, "heads") == range(3, 6)
    with pytest.raises(ValueError, match="heads=7 cannot be split evenly over tensor_parallel_size=2"):
        TensorParallel(1, 2).shard(7, "heads")
