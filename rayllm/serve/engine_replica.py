"""The Serve deployment that owns an engine: its placement group, its driver and, through the driver, its workers.

No request passes through it. It exists so that Serve places, watches and replaces engines as it does anything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from rayllm.config import EngineConfig, ResolvedConfig
from rayllm.engine.client import connect_by_name
from rayllm.engine.driver import RunningEngine, create_driver, known_engines
from rayllm.engine.resolve import resolve
from rayllm.errors import EngineError, EngineUnreachableError
from rayllm.executor.placement import cluster_devices
from rayllm.serve.loopback import keep_replica_on_loopback

logger = logging.getLogger("ray.serve")

_NAME_WAIT_S = 10.0
_QUICK_FAILURE_S = 60.0
_MAX_QUICK_FAILURES = 3
_IDLE_POLL_S = 0.1


def resolve_on_cluster(config: EngineConfig) -> ResolvedConfig:
    """What follows from `config` in this process's Ray cluster; the same answer in each of its processes."""
    num_gpus, num_cores = cluster_devices()
    return resolve(config, num_gpus=num_gpus, num_cores=num_cores, backend="ray")


class RestartBudget:
    """Allows a restart unless the last few each failed soon after the one before."""

    def __init__(self, max_quick_failures: int = _MAX_QUICK_FAILURES, quick_s: float = _QUICK_FAILURE_S):
        self._max_quick_failures = max_quick_failures
        self._quick_s = quick_s
        self._failures: list[float] = []

    def allows(self, now_s: float) -> bool:
        """Notes a failure at `now_s`; False when there have been too many in too short a time."""
        self._failures = [at for at in self._failures if now_s - at < self._quick_s] + [now_s]
        return len(self._failures) <= self._max_quick_failures


class EngineReplica:
    """One engine. Its constructor returns when the engine serves; Serve shows a failure's text in its status.

    A driver that dies or fails is replaced here, in seconds. `check_health` raises, so that Serve replaces this
    replica, only when that did not help.
    """

    async def __init__(self, config: EngineConfig, shutdown_timeout_s: float):  # type: ignore[misc]  # Serve awaits it
        keep_replica_on_loopback()
        self._config = config
        self._shutdown_timeout_s = shutdown_timeout_s
        self._failure: str | None = None
        self._restarts = RestartBudget()
        await _name_is_free(config.name)
        self._engine = await self._start()
        self._supervisor = asyncio.create_task(self._supervise())

    async def check_health(self) -> None:
        """Asked by Serve; `EngineError` when the engine is beyond what can be mended here."""
        if self._failure is not None:
            raise EngineError(self._failure)

    async def __del__(self) -> None:
        """Serve's goodbye: open requests get their time, then everything of the engine ends."""
        if not hasattr(self, "_supervisor"):
            return
        self._supervisor.cancel()
        await self._wait_idle(self._shutdown_timeout_s)
        await asyncio.to_thread(self._engine.close)

    async def _start(self) -> RunningEngine:
        resolved = resolve_on_cluster(self._config)
        engine = await asyncio.to_thread(create_driver, resolved)
        try:
            await engine.driver.start.remote(resolved.model_dump_json())
        except BaseException as error:
            await asyncio.to_thread(engine.close)
            raise _own_error(error) from None
        return engine

    async def _supervise(self) -> None:
        while True:
            reason = await _failure_of(self._engine.driver)
            failed_s = time.monotonic()
            logger.error("engine %r failed: %s", self._config.name, reason)
            if not self._restarts.allows(failed_s):
                self._failure = f"engine {self._config.name!r} keeps failing; last: {reason}"
                return
            try:
                await asyncio.to_thread(self._engine.close)
                closed_s = time.monotonic()
                self._engine = await self._start()
            except Exception as error:
                self._failure = f"engine {self._config.name!r} failed ({reason}) and did not start again: {error}"
                return
            now_s = time.monotonic()
            logger.warning(
                "engine %r runs again after %.2f s, of which %.2f s to clear up",
                self._config.name,
                now_s - failed_s,
                closed_s - failed_s,
            )

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


async def _name_is_free(name: str) -> None:
    """Waits a little for a former replica's driver of this name to be gone."""
    deadline = time.monotonic() + _NAME_WAIT_S
    while name in known_engines() and time.monotonic() < deadline:
        await asyncio.sleep(0.1)


async def _failure_of(driver: Any) -> str:
    """Returns once the driver has failed or died, with the reason."""
    import ray

    try:
        return str(await driver.wait_failed.remote())
    except ray.exceptions.RayActorError as error:
        return f"its driver died: {' '.join(str(error).split())[:300]}"


def _own_error(error: BaseException) -> BaseException:
    """The error that the driver raised, without Ray's wrapping where it is one of ours."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, (EngineError, ValueError)) else error
