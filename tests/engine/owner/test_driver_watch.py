from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rayllm.engine.owner import driver_watch
from rayllm.engine.owner.driver_watch import DriverWatch


class _Running:
    driver = None

    def __init__(self, looks: list[str | Exception]) -> None:
        self.looks = looks
        self.local = False

    def is_local(self) -> bool:
        return self.local

    def why_lost(self) -> str:
        look = self.looks.pop(0)
        if isinstance(look, Exception):
            raise look
        return look


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(driver_watch, "_LOOK_PERIOD_S", 0.0)
    monkeypatch.setattr(driver_watch, "ray_is_initialized", lambda: True)
    return lambda running: DriverWatch(running, "engine")


async def test_a_lost_node_is_told_also_after_ray_did_not_answer(watch: Any) -> None:
    running = _Running(["", RuntimeError("GCS"), "", "node 1 is lost: nothing listens"])
    assert await watch(running)._node_lost() == "its driver is lost: node 1 is lost: nothing listens"


async def test_the_own_node_is_not_asked(watch: Any) -> None:
    running = _Running([])
    running.local = True
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(watch(running)._node_lost(), 0.2)
