from __future__ import annotations

import pytest

from rayllm.errors import EngineError
from rayllm.executor.local_ranks import check_local_links


def test_processes_of_this_machine_check_their_link() -> None:
    links = check_local_links(2, "cpu")
    assert [(link.rank, link.peer, link.problem) for link in links] == [(0, 1, ""), (1, 0, "")]
    assert all(link.gigabytes_per_s > 0 for link in links)


def test_a_rank_that_cannot_take_part_is_named() -> None:
    with pytest.raises(EngineError, match="rank 0 failed: "):
        check_local_links(1, "cuda")
