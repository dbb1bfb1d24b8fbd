from __future__ import annotations

from typing import Any

import pytest

from rayllm.engine.address import DriverAddress
from rayllm.engine.client import named_connection
from rayllm.engine.client.named_connection import leave_when_replaced
from rayllm.errors import EngineError, EngineUnreachableError


class _Connection:
    """Answers so many times, then never again."""

    def __init__(self, num_answers: int, code: str = "engine_timeout"):
        self.lost_reason: str | None = None
        self._num_answers = num_answers
        self._code = code

    async def stats(self, timeout_s: float) -> None:
        self._num_answers -= 1
        if self._num_answers < 0:
            raise EngineError("silence", code=self._code)

    def close(self, reason: str) -> None:
        self.lost_reason = reason


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Tokens of the drivers that are found, one a look; None where there is none."""
    found: list[str | None] = []

    async def find_address(engine: str, namespace: str) -> DriverAddress:
        token = found.pop(0)
        if token is None:
            raise EngineUnreachableError("no engine")
        return DriverAddress("node", "/path", token)

    monkeypatch.setattr(named_connection, "find_address", find_address)
    monkeypatch.setattr(named_connection, "_LOOK_PERIOD_S", 0.0)
    return found


async def test_a_silent_driver_is_left_once_the_engine_has_another(found: list[str | None]) -> None:
    found += ["old", None, "old", "new"]
    connection: Any = _Connection(3)
    await leave_when_replaced(connection, "old", "engine", "rayllm")
    assert found == []
    assert connection.lost_reason == "it does not answer, and the engine has another driver"


async def test_a_connection_that_ended_is_not_followed(found: list[str | None]) -> None:
    connection: Any = _Connection(3, code="engine_gone")
    await leave_when_replaced(connection, "old", "engine", "rayllm")
    assert connection.lost_reason is None
