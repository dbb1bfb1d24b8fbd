"""Fault injection, in the driver."""

import pytest

from rayllm.engine.driver.fault_injection import kill_rank
from rayllm.errors import EngineError
from rayllm.executor.worker_process import WorkerPlace

PLACE = WorkerPlace(4711, "n" * 56, "10.0.0.1", ("cpu",))


class Group:
    def __init__(self, places: dict[int, WorkerPlace]):
        self._places = places

    def kill(self, rank: int) -> WorkerPlace | None:
        return self._places.get(rank)


def test_it_says_which_process_was_killed() -> None:
    killed = kill_rank(Group({1: PLACE}), 1)
    assert (killed.rank, killed.place) == (1, PLACE)


@pytest.mark.parametrize("executor", [None, Group({})])
def test_a_rank_without_a_process_is_an_error(executor: Group | None) -> None:
    with pytest.raises(EngineError, match="rank 1 is being replaced already") as raised:
        kill_rank(executor, 1)
    assert raised.value.code == "worker_not_running"
