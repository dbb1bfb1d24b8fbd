"""Keep a `JournaledClient` attached to drivers of this process's own making."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from rayllm.config import ResolvedConfig
from rayllm.engine.client.driver_connection import DriverConnection, connect
from rayllm.engine.client.journaled_client import JournaledClient
from rayllm.engine.driver.actor import Driver
from rayllm.engine.owner.owner import OwnedEngine
from rayllm.errors import EngineError
from rayllm.executor.inproc import InprocExecutor


class OwnedDrivers:
    """Keeps an engine attached to drivers of this process's own making."""

    def __init__(self, owned: OwnedEngine):
        self._owned = owned
        self._was_lost = False
        self._watch: asyncio.Task[None] | None = None

    async def keep_attached(self, engine: JournaledClient) -> None:
        try:
            await engine.keep_attached(self._connect, self._on_unreachable, on_lost=self._on_lost)
        finally:
            self._on_lost("")

    async def _connect(self) -> DriverConnection:
        owned = self._owned
        if self._was_lost:
            await asyncio.to_thread(owned.replace_if_failed)
        connection = await connect(await owned.driver.address.remote(_this_node()))
        self._watch = asyncio.create_task(self._close_when_failed(connection))
        return connection

    async def _close_when_failed(self, connection: DriverConnection) -> None:
        await self._owned.wait_failed()
        connection.close()

    async def _on_unreachable(self, error: Exception) -> None:
        self._on_lost("")
        if self._owned.has_given_up:
            raise error

    def _on_lost(self, reason: str) -> None:
        self._was_lost = True
        if self._watch is not None:
            self._watch.cancel()


class LocalDriver:
    """Keeps an engine attached to the driver in this process; when that fails, there is no other."""

    def __init__(self, config: ResolvedConfig):
        self.driver = Driver(lambda config, on_stage: InprocExecutor.load(config))
        self._listeners: set[Callable[[str], None]] = set()
        self.driver.start(config, on_failed=self._notify)
        self.config = self.driver.config or config

    def _notify(self, reason: str) -> None:
        for listener in list(self._listeners):
            with contextlib.suppress(RuntimeError):  # the program has left that event loop
                listener(reason)

    async def keep_attached(self, engine: JournaledClient) -> None:
        loop = asyncio.get_running_loop()
        failed: asyncio.Future[str] = loop.create_future()

        def listener(reason: str) -> None:
            loop.call_soon_threadsafe(failed.set_result, reason)

        self._listeners.add(listener)
        try:
            async with await connect(self.driver.address()) as connection:
                engine.attach(connection)
                raise EngineError(self.driver.failure or await failed)
        finally:
            self._listeners.discard(listener)


def _this_node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())
