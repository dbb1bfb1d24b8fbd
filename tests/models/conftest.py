from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks import RankPool


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """Two ranks of a tensor-parallel group, each a process."""
    pool = RankPool(2)
    yield pool
    pool.close()
