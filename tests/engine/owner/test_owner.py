from __future__ import annotations

from typing import Any

import pytest
from fakes import fake_config

from rayllm.engine.owner import owner
from rayllm.engine.owner.owner import OwnedEngine, RestartBudget
from rayllm.errors import ConfigError, EngineError, NodeLostError, NoRoomError


def test_failures_long_ago_do_not_count() -> None:
    budget = RestartBudget(max_quick_failures=2, quick_s=10)
    assert [budget.allows(at) for at in (0, 1, 2)] == [True, True, False]
    budget = RestartBudget(max_quick_failures=2, quick_s=10)
    assert [budget.allows(at) for at in (0, 20, 40, 60)] == [True] * 4


class _Running:
    def __init__(self) -> None:
        self.ended = self.closed = False
        self.error: Exception | None = None
        self.was_asked = True
        self.lost: dict[str, str] = {}
        self.num_restarts: int | None = None
        self.previous_failure = ""

    def start(self, config: Any, on_stage: Any = None, num_restarts: int = 0, previous_failure: str = "") -> Any:
        self.num_restarts, self.previous_failure = num_restarts, previous_failure
        if self.error is not None:
            raise self.error
        return config

    def end_driver(self, *, is_reachable: bool = True) -> str:
        self.ended, self.was_asked = True, is_reachable
        return "the group"

    def node_id(self) -> str:
        return "1"

    def lost_nodes(self, silence_s: float = 3.0) -> dict[str, str]:
        return self.lost

    def close(self) -> None:
        self.closed = True


class _Made(list[tuple[_Running, Any]]):
    """Drivers that were made, and the placement group that each was offered. `errors`: of the next starts; `refusals`:
    of the next attempts to make one."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[Exception | None] = []
        self.refusals: list[Exception | None] = []


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> _Made:
    made = _Made()

    def create_driver(config: Any, factory: Any, previous_group: Any = None) -> _Running:
        if made.refusals and (refusal := made.refusals.pop(0)) is not None:
            raise refusal
        made.append((_Running(), previous_group))
        made[-1][0].error = made.errors.pop(0) if made.errors else None
        return made[-1][0]

    monkeypatch.setattr(owner, "create_driver", create_driver)
    monkeypatch.setattr(owner, "await_free", str)
    monkeypatch.setattr(owner, "ray_is_initialized", lambda: True)
    monkeypatch.setattr(owner, "_ROOM_LOOK_S", 0.0)
    return made


@pytest.fixture
def removed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Placement groups that were given back."""
    removed: list[Any] = []
    monkeypatch.setattr(owner, "give_back", removed.append)
    return removed


def test_the_next_driver_is_offered_the_place_of_the_last(made: _Made) -> None:
    engine = OwnedEngine(fake_config())
    engine.start()
    engine.replace("it died")
    assert [(running.ended, group) for running, group in made] == [(True, None), (False, "the group")]
    assert [running.previous_failure for running, _ in made] == ["", "it died"]
    engine.close()
    assert [running.closed for running, _ in made] == [False, True]


def test_drivers_that_keep_failing_are_given_up(made: _Made) -> None:
    engine = OwnedEngine(fake_config())
    for _ in range(3):
        engine.replace("it died")
        assert not engine.has_given_up
    with pytest.raises(EngineError, match="engine 'default' keeps failing; last failure: it died"):
        engine.replace("it died")
    assert engine.has_given_up
    assert [running.num_restarts for running, _ in made] == [None, 1, 2, 3]


def test_a_replacement_made_while_its_owner_closes_is_closed_too(made: _Made) -> None:
    engine = OwnedEngine(fake_config())
    engine.close()
    with pytest.raises(EngineError, match="being closed"):
        engine.replace("it died")
    assert made[1][0].closed


def test_a_driver_that_does_not_start_is_replaced_as_one_that_was_lost(made: _Made) -> None:
    engine = OwnedEngine(fake_config())
    made.errors = [NodeLostError("the driver could not start: node 1 is lost"), EngineError("rank 0 died"), None]
    engine.replace("it died")
    assert not engine.has_given_up
    assert [running.num_restarts for running, _ in made] == [None, 1, 2, 3]
    assert [running.ended for running, _ in made] == [True, True, True, False]
    assert made[3][0].previous_failure.startswith("it died; the next driver did not start: the driver could not start")


def test_drivers_that_never_start_are_given_up(made: _Made) -> None:
    engine = OwnedEngine(fake_config())
    made.errors = [EngineError("rank 0 died")] * 9
    with pytest.raises(EngineError, match=r"keeps failing; last failure: it died; the next .*rank 0 died"):
        engine.replace("it died")
    assert len(made) == 4
    assert engine.has_given_up


def test_what_no_other_start_would_change_is_final(made: _Made) -> None:
    engine = OwnedEngine(fake_config())
    made.errors = [ConfigError("no such folder")]
    with pytest.raises(EngineError, match=r"failed \(it died\) and did not start again: no such folder"):
        engine.replace("it died")
    assert len(made) == 2


def test_the_next_driver_waits_for_room_without_an_end_where_its_owner_serves(
    made: _Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(owner, "publish_stage", lambda name, stage: told.append(stage))
    engine = OwnedEngine(fake_config(), room_wait_s=float("inf"))
    made.refusals = [NoRoomError("free are 0 CPUs")] * 5 + [NoRoomError("free are 1 CPUs")] * 5
    engine.replace("it died")
    assert made[1] == (made[1][0], None)  # a group that has no room is not offered again
    waiting = "waiting for free resources in the Ray cluster: free are"
    assert told == ["restarting the engine (it died)", f"{waiting} 0 CPUs", f"{waiting} 1 CPUs", ""]


def test_who_waits_for_room_gives_up_in_time_and_when_it_is_closed(made: _Made) -> None:
    engine = OwnedEngine(fake_config(), room_wait_s=0.0)
    made.refusals = [NoRoomError("free are 0 CPUs")] * 10**6
    with pytest.raises(EngineError, match="did not start again: free are 0 CPUs"):
        engine.replace("it died")
    made.refusals = []
    engine = OwnedEngine(fake_config(), room_wait_s=float("inf"))
    made.refusals = [NoRoomError("free are 0 CPUs")] * 10**6
    engine.close()
    with pytest.raises(EngineError, match="did not start again"):
        engine.replace("it died")


def test_a_first_start_on_a_lost_node_is_tried_elsewhere(made: _Made, removed: list[Any]) -> None:
    made.errors = [EngineError("the driver died while it started"), None]
    engine = OwnedEngine(fake_config())
    made[0][0].lost = {"1": "nothing listens"}
    engine.start()
    assert [(running.ended, running.was_asked, group) for running, group in made] == [
        (True, False, None),
        (False, True, None),
    ]
    assert removed == ["the group"]


def test_lost_nodes_are_no_fault_of_the_engines(made: _Made, removed: list[Any]) -> None:
    engine = OwnedEngine(fake_config())
    for _ in range(9):
        made[-1][0].lost = {"2": "nothing listens"}  # a rank's
        engine.replace("a rank was lost")
    assert all(running.was_asked for running, _ in made)
    assert [group for _, group in made] == [None] * 10


def test_a_first_start_that_fails_on_a_node_that_answers_is_final(made: _Made) -> None:
    made.errors = [EngineError("rank 0 died")]
    engine = OwnedEngine(fake_config())
    with pytest.raises(EngineError, match="rank 0 died"):
        engine.start()
    assert len(made) == 1
