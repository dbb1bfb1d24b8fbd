"""The Serve deployment that owns an engine: its placement group, its driver and, through the driver, its workers.

No request passes through it. It exists so that Serve places, watches and replaces engines as it does anything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time

from rayllm.config import EngineConfig, ResolvedConfig
from rayllm.engine.client.named_connection import connect_by_name
from rayllm.engine.owner.owner import OwnedEngine, await_free
from rayllm.engine.owner.resolve import resolve
from rayllm.errors import EngineError, EngineUnreachableError
from rayllm.executor.placement import cluster_devices
from rayllm.observability.logs import setup_logging
from rayllm.serve.serve_private import prepare_replica_sockets

_IDLE_POLL_S = 0.1
_CLOSE_TIME_S = 15.0
"""What an engine that ends may take, beside the time of its open requests."""
_SHOW_FAILURE_S = 20.0


def resolve_on_cluster(config: EngineConfig) -> ResolvedConfig:
    """What follows from `config` in this process's Ray cluster; the same answer in each of its processes."""
    num_gpus, num_cores = cluster_devices()
    return resolve(config, num_gpus=num_gpus, num_cores=num_cores, backend="ray")


class EngineReplica:
    """One engine. Its constructor returns when the engine serves; Serve shows a failure's text in its status.

    A driver that dies or fails is replaced here, in seconds. When that does not help, `failure` says why, the last
    driver is left to say it at `/health`, and after `_SHOW_FAILURE_S` `check_health` raises, so that Serve replaces
    this replica; `rayllm serve` has ended by then.
    """

    async def __init__(self, config: EngineConfig, shutdown_timeout_s: float):  # type: ignore[misc]  # Serve awaits it
        setup_logging(config.log_format, process="engine", file=config.log_file)
        prepare_replica_sockets()
        self._config = config
        self._shutdown_timeout_s = shutdown_timeout_s
        self._failure: str | None = None
        self._failed_s = 0.0
        # When Serve replaces a replica, the previous one may still be letting its open requests finish.
        await asyncio.to_thread(await_free, config.name, shutdown_timeout_s + _CLOSE_TIME_S)
        self._engine = await self._start()
        self._supervisor = asyncio.create_task(self._supervise())

    async def check_health(self) -> None:
        """Asked by Serve; `EngineError` when the engine cannot be recovered here."""
        if self._failure is not None and time.monotonic() - self._failed_s > _SHOW_FAILURE_S:
            raise EngineError(self._failure)

    async def failure(self) -> str | None:
        """Why the engine does not run and will not; None while it does or may."""
        return self._failure

    async def __del__(self) -> None:
        """Serve's goodbye: open requests get their time, then everything of the engine ends."""
        if not hasattr(self, "_supervisor"):
            return
        self._supervisor.cancel()
        await self._wait_idle(self._shutdown_timeout_s)
        await asyncio.to_thread(self._engine.close)

    async def _start(self) -> OwnedEngine:
        # Who serves waits for room as long as it takes: the requests themselves have `driver_wait_s`.
        engine = await asyncio.to_thread(OwnedEngine, resolve_on_cluster(self._config), room_wait_s=math.inf)
        try:
            await asyncio.to_thread(engine.start)
        except BaseException:
            await asyncio.to_thread(engine.close)
            raise
        return engine

    async def _supervise(self) -> None:
        while self._failure is None:
            reason = await self._engine.wait_failed()
            try:
                await asyncio.to_thread(self._engine.replace, reason)
            except Exception as error:
                self._failure, self._failed_s = str(error), time.monotonic()

    async def _wait_idle(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(EngineUnreachableError, EngineError):
            connection = await connect_by_name(self._config.name, name="engine replica, stopping")
            try:
                while time.monotonic() < deadline:
                    stats = await connection.stats()
                    if not stats.num_running and not stats.num_waiting:
                        return
                    await asyncio.sleep(_IDLE_POLL_S)
            finally:
                connection.close()
