"""An engine in the hands of the process that made it: whoever owns one gives it another driver when it loses its own.

Blocking, but for `wait_failed`; nothing of Ray is imported before it is needed.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from rayllm.config import ResolvedConfig
from rayllm.engine.client import BlockingConnection, connect_by_name
from rayllm.engine.driver import RunningEngine, create_driver, known_engines
from rayllm.errors import EngineError
from rayllm.executor.ray_cluster import ray_is_initialized
from rayllm.executor.worker import RunnerFactory, WorkerPlace, death_reason, is_stopped, kill_process

log = logging.getLogger(__name__)

_QUICK_FAILURE_S = 60.0
_MAX_QUICK_FAILURES = 3
_NOTICE_S = 2.0
"""For Ray to tell of a driver's death, after its socket did."""
_NAME_WAIT_S = 10.0
_LOOK_PERIOD_S = 0.5
_ASK_PERIOD_S = 5.0
_MAX_SILENCE_S = 30.0
"""A driver answers between and during steps: only a machine that is far too busy lets it take seconds."""


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


class OwnedEngine:
    """Made with a driver that is not started: `start`, then `replace` whenever `wait_failed` or `failure` says that the
    driver is lost, then `close`. Raises `ConfigError` where there is no room or the name is taken.
    """

    def __init__(self, config: ResolvedConfig, runner_factory: RunnerFactory | None = None):
        self.config = config
        self._runner_factory = runner_factory
        self._restarts = RestartBudget()
        self._num_restarts = 0
        self._closed = False
        self._replacing = threading.Lock()
        self.has_given_up = False
        """Whether `replace` has failed."""
        self._running: RunningEngine = create_driver(config, runner_factory)

    @property
    def driver(self) -> Any:
        """The actor's handle; another one after `replace`."""
        return self._running.driver

    def start(self, on_stage: Callable[[str], None] | None = None) -> None:
        """Brings the engine up; see `RunningEngine.start`. After an error `close` it."""
        self._running.start(self.config, on_stage)

    def connect(self) -> BlockingConnection:
        """A client of the driver, for one thread."""
        import ray

        _check_connected()
        address = self.driver.address.remote(ray.get_runtime_context().get_node_id())
        return BlockingConnection(ray.get(address))

    def reconnect(self, reason: str) -> BlockingConnection:
        """The same after the connection was lost for `reason`: to another driver where this one is lost too."""
        self.replace_if_failed()
        return self.connect()

    def replace_if_failed(self) -> None:
        """As `replace`, where the driver is lost; of several threads that see it lost, one replaces it."""
        with self._replacing:
            failure = self.failure()
            if failure is not None:
                self.replace(failure)

    async def wait_failed(self) -> str:
        """Returns once the driver has failed, died or fallen silent, with the reason. One that is silent is killed: it
        would not hear Ray."""
        watches = [asyncio.ensure_future(watch) for watch in (self._told(), self._stopped(), self._silent())]
        try:
            await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            return next(watch.result() for watch in watches if watch.done())
        finally:
            for watch in watches:
                watch.cancel()

    async def _told(self) -> str:
        import ray

        try:
            return str(await self.driver.wait_failed.remote())
        except ray.exceptions.RayActorError as error:
            return f"its driver died: {death_reason(error)}"

    async def _stopped(self) -> str:
        """Returns where the driver's process, on this node, is stopped at two looks."""
        place = await self._place()
        num_looks = 0
        while num_looks < 2:
            await asyncio.sleep(_LOOK_PERIOD_S)
            num_looks = num_looks + 1 if is_stopped(place) else 0
        kill_process(place)
        return "its driver's process was stopped"

    async def _silent(self) -> str:
        """Returns where the driver does not answer its clients, though its process is there."""
        place = await self._place()
        try:
            async with await connect_by_name(self.config.engine.name, name="owner") as connection:
                while True:
                    await connection.stats(_MAX_SILENCE_S)
                    await asyncio.sleep(_ASK_PERIOD_S)
        except Exception as error:
            if not isinstance(error, EngineError) or error.code != "engine_timeout":
                await asyncio.Event().wait()  # it is lost, which Ray will tell
        kill_process(place)
        return f"its driver did not answer for {_MAX_SILENCE_S:g} s"

    async def _place(self) -> WorkerPlace:
        """Where the driver runs. Waits for ever where it is on another node, or lost."""
        import ray

        try:
            place: WorkerPlace = (await self.driver.describe.remote()).driver
        except ray.exceptions.RayError:
            place = WorkerPlace(0, "", "", ())
        if place.node_id != ray.get_runtime_context().get_node_id():
            await asyncio.Event().wait()
        return place

    def failure(self) -> str | None:
        """Why the driver is lost, of which some sign was seen; None where it is not. `EngineError` where this process
        has left Ray."""
        import ray

        _check_connected()
        try:
            return str(ray.get(self.driver.wait_failed.remote(), timeout=_NOTICE_S))
        except ray.exceptions.GetTimeoutError:
            return None
        except ray.exceptions.RayActorError as error:
            return f"its driver died: {death_reason(error)}"

    def replace(self, reason: str) -> None:
        """Ends what is left of the driver lost for `reason` and starts another, on the same devices where they are
        still there. Raises `EngineError` where drivers keep failing, and what `start` raises."""
        name, failed_s = self.config.engine.name, time.monotonic()
        log.error("engine %r failed: %s", name, reason)
        self.has_given_up = True
        if not self._restarts.allows(failed_s):
            raise EngineError(f"engine {name!r} keeps failing; last: {reason}")
        group = self._running.end_driver()
        await_free(name)
        cleared_s = time.monotonic() - failed_s
        try:
            self._running = create_driver(self.config, self._runner_factory, group)
            if self._closed:
                self._running.close()
                raise EngineError("the engine is being closed")
            self._num_restarts += 1
            self._running.start(self.config, num_restarts=self._num_restarts, former_failure=reason)
        except Exception as error:
            raise EngineError(f"engine {name!r} failed ({reason}) and did not start again: {error}") from error
        self.has_given_up = False
        total_s = time.monotonic() - failed_s
        log.warning("engine %r runs again after %.2f s, of which %.2f s to clear up", name, total_s, cleared_s)

    def close(self) -> None:
        """Ends driver and workers and gives the resources back; a `replace` under way on another thread fails."""
        self._closed = True
        if ray_is_initialized():  # else all that it made has ended with the connection to Ray
            self._running.close()


def _check_connected() -> None:
    """Ray would start a cluster of its own for whoever asks it something."""
    if not ray_is_initialized():
        raise EngineError(
            "the engine ended when this process left Ray (ray.shutdown): make it anew", code="engine_gone"
        )


def await_free(name: str, timeout_s: float = _NAME_WAIT_S) -> None:
    """Waits for a former driver of this name to end, and for Ray to forget it."""
    deadline = time.monotonic() + timeout_s
    while name in known_engines() and time.monotonic() < deadline:
        time.sleep(0.02)
