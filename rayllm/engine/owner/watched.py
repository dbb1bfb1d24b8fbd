"""An engine of this process's own whose Ray may die: no call waits longer than Ray lives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from rayllm.config import ResolvedConfig
from rayllm.engine.client.blocking_driver_connection import BlockingDriverConnection
from rayllm.engine.client.journaled_client import JournaledClient
from rayllm.engine.owner.owner import OwnedEngine
from rayllm.errors import EngineError
from rayllm.executor.ray_connection import ray_watch

log = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 45.0

KeepAttached = Callable[[JournaledClient], Coroutine[Any, Any, None]]
"""Attaches drivers to an engine until it is cancelled, or raises where there will be none."""


def while_ray_lives(keep_attached: KeepAttached) -> KeepAttached:
    """The same until this process's Ray dies: `EngineError` with code `ray_died` then."""

    async def keep(engine: JournaledClient) -> None:
        await ray_watch().until_lost(keep_attached(engine))

    return keep


class WatchedEngine:
    """`OwnedEngine` for a program that blocks. Every method, and whoever waits in a connection that was made here, gets
    an `EngineError` with code `ray_died` where Ray dies."""

    def __init__(self, config: ResolvedConfig):
        self._watch = ray_watch()
        self.owned = self._watch.call(lambda: OwnedEngine(config))

    def start(self) -> None:
        """Brings the engine up; after an error `close` it."""
        self._watch.call(self.owned.start)

    def connect(self) -> BlockingDriverConnection:
        """A client of the driver, for one thread."""
        return self._watched(self._watch.call(self.owned.connect))

    def reconnect(self, reason: str) -> BlockingDriverConnection:
        """The same after the connection was lost for `reason`: to another driver where this one is lost too."""
        return self._watched(self._watch.call(lambda: self.owned.reconnect(reason)))

    def _watched(self, connection: BlockingDriverConnection) -> BlockingDriverConnection:
        self._watch.on_lost(lambda error: connection.cut())
        return connection

    def close(self) -> None:
        """Ends driver and workers, where Ray can do so; what it cannot ends with the connection to it."""
        if self._watch.error is not None:
            return
        try:
            self._watch.call(self.owned.close, _CLOSE_TIMEOUT_S)
        except (EngineError, TimeoutError) as error:
            log.warning("the engine did not shut down cleanly: %s", error)
