"""An engine in the hands of the process that made it: whoever owns one gives it another driver when it loses its own.

Blocking, but for `wait_failed`; nothing of Ray is imported before it is needed.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from rayllm.config import ResolvedConfig
from rayllm.engine.client.blocking_driver_connection import BlockingDriverConnection
from rayllm.engine.discovery import known_engines
from rayllm.engine.owner.driver_handle import DriverHandle, create_driver
from rayllm.engine.owner.driver_watch import DriverWatch
from rayllm.engine.owner.stage_board import publish_stage
from rayllm.errors import EngineError, EngineUnreachableError, NoRoomError
from rayllm.executor.placement import give_back
from rayllm.executor.ray_connection import ray_is_initialized
from rayllm.executor.worker import RunnerFactory
from rayllm.executor.worker_process import death_reason

log = logging.getLogger(__name__)

_QUICK_FAILURE_S = 60.0
_MAX_QUICK_FAILURES = 3
_NOTICE_S = 2.0
"""For Ray to report a driver's death after its socket closed."""
_NAME_WAIT_S = 10.0
_ADDRESS_TIMEOUT_S = 10.0
_ROOM_LOOK_S = 1.0
_KNOWN_SILENCE_S = 1.0
"""For a node to answer once its driver is known to be lost."""
_NODE_LOOK_S = 1.0


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

    What starts on a node that turns out to be lost is started on another. `room_wait_s`: how long a lost driver's
    successor waits for the cluster to have room (default: `driver_wait_s`).
    """

    def __init__(
        self, config: ResolvedConfig, runner_factory: RunnerFactory | None = None, room_wait_s: float | None = None
    ):
        self.config = config
        self._runner_factory = runner_factory
        self._room_wait_s = config.engine.driver_wait_s if room_wait_s is None else room_wait_s
        self._restarts = RestartBudget()
        self._num_restarts = 0
        self._closed = False
        self._replacing = threading.Lock()
        self.has_given_up = False
        """Whether `replace` has failed."""
        self._running: DriverHandle = create_driver(config, runner_factory)

    @property
    def driver(self) -> Any:
        """The actor's handle; another one after `replace`."""
        return self._running.driver

    def start(self, on_stage: Callable[[str], None] | None = None) -> None:
        """Brings the engine up; see `DriverHandle.start`. After an error `close` it."""
        while True:
            try:
                self.config = self._running.start(self.config, on_stage)
                break
            except EngineError as error:
                lost = self._running.lost_nodes()
                if not lost or self._closed:
                    raise
                log.warning("engine %r did not start (%s); starting it on other nodes", self.name, error)
            self._make_next(self._end_driver(lost))
        publish_stage(self.name, "")

    @property
    def name(self) -> str:
        return self.config.engine.name

    def connect(self) -> BlockingDriverConnection:
        """A client of the driver, for one thread. Raises `EngineError` where the driver does not answer."""
        import ray

        _check_connected()
        node_id = ray.get_runtime_context().get_node_id()
        try:
            address = ray.get(self.driver.address.remote(node_id), timeout=_ADDRESS_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            message = f"the driver of engine {self.name!r} did not answer within {_ADDRESS_TIMEOUT_S:g} s"
            raise EngineError(message, code="engine_timeout") from None
        except ray.exceptions.RayActorError as error:
            raise EngineError(f"the driver died: {death_reason(error)}", code="engine_gone") from None
        connection = BlockingDriverConnection(address)
        if address.node_id != node_id:
            arguments = self._running, connection
            threading.Thread(target=_close_with_node, args=arguments, name="node-watch", daemon=True).start()
        return connection

    def reconnect(self, reason: str) -> BlockingDriverConnection:
        """The same after the connection was lost for `reason`: to another driver where this one is lost too."""
        while True:
            self.replace_if_failed()
            try:
                return self.connect()
            except (EngineError, EngineUnreachableError) as error:
                if not self._restarts.allows(time.monotonic()):
                    raise
                log.warning("engine %r: %s", self.name, error)

    def replace_if_failed(self) -> None:
        """As `replace`, where the driver is lost; of several threads that see it lost, one replaces it."""
        with self._replacing:
            failure = self.failure()
            if failure is not None:
                self.replace(failure)

    async def wait_failed(self) -> str:
        """Returns once the driver has failed, died or fallen silent, or its node is lost, with the reason. One that is
        silent is killed: it would not hear Ray."""
        watched = DriverWatch(self._running, self.name)
        return await watched.wait_failed()

    def failure(self) -> str | None:
        """Why the driver is lost, of which some sign was seen; None where it is not. `EngineError` where this process
        has left Ray."""
        import ray

        _check_connected()
        reported = self.driver.wait_failed.remote()
        if lost := self._running.why_lost():
            return f"its driver is lost: {lost}"
        try:
            return str(ray.get(reported, timeout=_NOTICE_S))
        except ray.exceptions.GetTimeoutError:
            return None
        except ray.exceptions.RayActorError as error:
            return f"its driver died: {death_reason(error)}"

    def replace(self, reason: str) -> None:
        """Ends what is left of the driver lost for `reason` and starts another, on the same devices where they are
        still there, else elsewhere; one that does not start is replaced too. Where the cluster has no room it waits for
        some. Raises `EngineError` where drivers keep failing or no room comes, and for what no other start would
        change."""
        failed_s = time.monotonic()
        self.has_given_up = True
        while True:
            log.error("engine %r failed: %s", self.name, reason)
            lost = self._running.lost_nodes(_KNOWN_SILENCE_S)
            if not lost and not self._restarts.allows(time.monotonic()):  # a lost node is no fault of the engine's
                raise EngineError(f"engine {self.name!r} keeps failing; last failure: {reason}")
            publish_stage(self.name, f"restarting the engine ({reason})")
            try:
                self._make_next(self._end_driver(lost))
                cleared_s = time.monotonic() - failed_s
                self._num_restarts += 1
                self._running.start(self.config, num_restarts=self._num_restarts, previous_failure=reason)
                break
            except EngineError as error:
                if self._closed:
                    raise
                reason = f"{reason}; the next driver did not start: {error}"
            except Exception as error:
                raise EngineError(f"engine {self.name!r} failed ({reason}) and did not start again: {error}") from error
        self.has_given_up = False
        publish_stage(self.name, "")
        total_s = time.monotonic() - failed_s
        log.warning("engine %r recovered after %.2f s, of which %.2f s were cleanup", self.name, total_s, cleared_s)

    def _end_driver(self, lost: Collection[str]) -> Any:
        """Ends what is left of the driver; returns its placement group, unless a node of it is lost."""
        group = self._running.end_driver(is_reachable=self._running.node_id() not in lost)
        await_free(self.name)
        if lost:
            give_back(group)
        return None if lost else group

    def _make_next(self, group: Any) -> None:
        """Makes another driver in that placement group, or in another one once there is room."""
        deadline_s, logged = time.monotonic() + self._room_wait_s, ""
        while True:
            try:
                self._running = create_driver(self.config, self._runner_factory, group)
                break
            except NoRoomError as error:
                if self._closed or time.monotonic() > deadline_s:
                    raise
                if str(error) != logged:
                    logged = str(error)
                    log.error("engine %r is waiting for free resources: %s", self.name, error)
                    publish_stage(self.name, f"waiting for free resources in the Ray cluster: {error}")
            group = None  # it was removed
            time.sleep(_ROOM_LOOK_S)
        if self._closed:
            self._running.close()
            raise EngineError("the engine is being closed")

    def close(self) -> None:
        """Ends driver and workers and gives the resources back; a `replace` under way on another thread fails."""
        self._closed = True
        if ray_is_initialized():  # else all that it made has ended with the connection to Ray
            self._running.close()
            publish_stage(self.name, "")


def _close_with_node(running: DriverHandle, connection: BlockingDriverConnection) -> None:
    """Closes the connection once the driver's node is lost: of one that is frozen or unreachable it would not end."""
    while not connection.is_closed and ray_is_initialized():
        with contextlib.suppress(Exception):  # Ray does not answer just now
            if running.why_lost():
                connection.close()
                return
        time.sleep(_NODE_LOOK_S)


def _check_connected() -> None:
    """Ray would start a cluster of its own for whoever asks it something."""
    if not ray_is_initialized():
        raise EngineError(
            "the engine ended when this process disconnected from Ray (ray.shutdown): create a new one",
            code="engine_gone",
        )


def await_free(name: str, timeout_s: float = _NAME_WAIT_S) -> None:
    """Waits for a previous driver of this name to end, and for Ray to forget it."""
    deadline = time.monotonic() + timeout_s
    while name in known_engines() and time.monotonic() < deadline:
        time.sleep(0.02)
