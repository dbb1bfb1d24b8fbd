from __future__ import annotations

from typing import Any

import pytest
from fakes import fake_config

from rayllm.engine import owner
from rayllm.engine.owner import OwnedEngine, RestartBudget
from rayllm.errors import EngineError


def test_failures_long_ago_do_not_count() -> None:
    budget = RestartBudget(max_quick_failures=2, quick_s=10)
    assert [budget.allows(at) for at in (0, 1, 2)] == [True, True, False]
    budget = RestartBudget(max_quick_failures=2, quick_s=10)
    assert [budget.allows(at) for at in (0, 20, 40, 60)] == [True] * 4


class _Running:
    def __init__(self) -> None:
        self.ended = self.closed = False
        self.error: Exception | None = None
        self.num_restarts: int | None = None
        self.former_failure = ""

    def start(self, config: Any, on_stage: Any = None, num_restarts: int = 0, former_failure: str = "") -> None:
        self.num_restarts, self.former_failure = num_restarts, former_failure
        if self.error is not None:
            raise self.error

    def end_driver(self) -> str:
        self.ended = True
        return "the group"

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[_Running, Any]]:
    """Drivers that were made, and the placement group that each was offered."""
    made: list[tuple[_Running, Any]] = []

    def create_driver(config: Any, factory: Any, former_group: Any = None) -> _Running:
        made.append((_Running(), former_group))
        return made[-1][0]

    monkeypatch.setattr(owner, "create_driver", create_driver)
    monkeypatch.setattr(owner, "await_free", str)
    return made


def test_the_next_driver_is_offered_the_place_of_the_last(made: list[tuple[_Running, Any]]) -> None:
    engine = OwnedEngine(fake_config())
    engine.start()
    engine.replace("it died")
    assert [(running.ended, group) for running, group in made] == [(True, None), (False, "the group")]
    assert [running.former_failure for running, _ in made] == ["", "it died"]
    engine.close()
    assert [running.closed for running, _ in made] == [False, True]


def test_drivers_that_keep_failing_are_given_up(made: list[tuple[_Running, Any]]) -> None:
    engine = OwnedEngine(fake_config())
    for _ in range(3):
        engine.replace("it died")
        assert not engine.has_given_up
    with pytest.raises(EngineError, match="engine 'default' keeps failing; last: it died"):
        engine.replace("it died")
    assert engine.has_given_up
    assert [running.num_restarts for running, _ in made] == [None, 1, 2, 3]


def test_a_replacement_made_while_its_owner_closes_is_closed_too(made: list[tuple[_Running, Any]]) -> None:
    engine = OwnedEngine(fake_config())
    engine.close()
    with pytest.raises(EngineError, match="being closed"):
        engine.replace("it died")
    assert made[1][0].closed
