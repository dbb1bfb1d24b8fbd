"""Sees within a second that a process without which Ray cannot work has died or is stopped, and ends every wait for an
answer of Ray's then. Needs no Ray: Ray itself tells nobody, and its calls wait for ever.

    watch = RayWatch([RayProcess("raylet", process)])
    watch.call(lambda: ray.get(reference), timeout_s=10)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from rayllm.errors import EngineError
from rayllm.machine.processes import Process

log = logging.getLogger(__name__)

RAY_DIED = "ray_died"
"""Code of the error that ends what needs a Ray that is gone."""
_LOOK_PERIOD_S = 0.5
_NUM_STOPPED_LOOKS = 4
"""Looks in a row at which a process must be stopped to count as lost: those of a program that was itself stopped, with
all of its terminal's job, go on together with it."""

_T = TypeVar("_T")
LossListener = Callable[[EngineError], None]


@dataclass(frozen=True)
class RayProcess:
    """One of Ray's own processes on this machine: `raylet` or `gcs_server`."""

    name: str
    process: Process

    def __str__(self) -> str:
        return f"Ray's {self.name} (pid {self.process.pid})"


class RayWatch:
    """Watches `processes` until `close`. Without any, or where the system cannot tell, nothing is ever lost.

    With `ends_stopped`, one that is stopped for about two seconds is killed and counts as dead: Ray would wait a minute
    for it. That is for the program whose Ray it is.
    """

    def __init__(self, processes: Sequence[RayProcess], *, ends_stopped: bool = False):
        self._processes = [each for each in processes if each.process.is_known]
        self._ends_stopped = ends_stopped
        self._lock = threading.Lock()
        self._listeners: list[LossListener] = []
        self._error: EngineError | None = None
        self._closed_reader, self._closed_writer = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="ray-watch", daemon=True)
        self._thread.start()

    @property
    def error(self) -> EngineError | None:
        """What has died, for whoever needs it; None while all is well."""
        return self._error and EngineError(str(self._error), code=self._error.code)

    def raise_if_lost(self) -> None:
        """`EngineError` with code `ray_died` where Ray is lost."""
        if (error := self.error) is not None:
            raise error

    def on_lost(self, listener: LossListener) -> Callable[[], None]:
        """Calls `listener`, on a thread of the watch's, once Ray is lost; at once where it is. Returns what takes the
        listener away again."""
        with self._lock:
            if self._error is None:
                self._listeners.append(listener)
                return lambda: self._forget(listener)
        listener(self._error)
        return lambda: None

    def call(self, function: Callable[[], _T], timeout_s: float | None = None) -> _T:
        """What `function`, which asks Ray, returns or raises. It runs on a thread of its own, which is left behind
        where Ray is lost (`EngineError` with code `ray_died`) or the time is up (`TimeoutError`)."""
        self.raise_if_lost()
        answer: Future[_T] = Future()
        over = threading.Event()

        def ask() -> None:
            try:
                answer.set_result(function())
            except BaseException as error:  # SystemExit too: Ray raises it in threads that wait while it is shut down
                answer.set_exception(error)
            over.set()

        threading.Thread(target=ask, name="ray-call", daemon=True).start()
        forget = self.on_lost(lambda error: over.set())
        try:
            ended = over.wait(timeout_s)
        finally:
            forget()
        if answer.done():
            return answer.result()
        self.raise_if_lost()
        assert not ended
        raise TimeoutError(f"Ray did not answer within {timeout_s:g} s")

    def wait_lost(self, timeout_s: float) -> bool:
        """Whether Ray is lost, or becomes so within the time."""
        lost = threading.Event()
        forget = self.on_lost(lambda error: lost.set())
        try:
            return lost.wait(timeout_s)
        finally:
            forget()

    async def until_lost(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What `work` returns or raises. It is cancelled where Ray is lost (`EngineError` with code `ray_died`)."""
        working, lost = asyncio.create_task(work), asyncio.create_task(self._lost())
        try:
            await asyncio.wait({working, lost}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise lost.result()
        finally:
            working.cancel()
            lost.cancel()
            await asyncio.wait({working, lost}, timeout=_LOOK_PERIOD_S)

    async def _lost(self) -> EngineError:
        loop = asyncio.get_running_loop()
        lost: asyncio.Future[EngineError] = loop.create_future()

        def set_lost(error: EngineError) -> None:
            if not lost.done():
                lost.set_result(error)

        def notify(error: EngineError) -> None:
            with contextlib.suppress(RuntimeError):  # the program has left its event loop
                loop.call_soon_threadsafe(set_lost, error)

        forget = self.on_lost(notify)
        try:
            return await lost
        finally:
            forget()

    def close(self) -> None:
        """Looks no more. Idempotent."""
        with self._lock:
            writer, self._closed_writer = self._closed_writer, -1
        if writer >= 0:
            os.close(writer)
            self._thread.join()

    # ------------------------------------------------------------------------------------------ the watch's thread

    def _watch(self) -> None:
        opened = [_open_handle(each.process) for each in self._processes]
        handles = [handle for handle in opened if handle is not None]
        poll = select.poll()
        poll.register(self._closed_reader, select.POLLIN | select.POLLHUP)
        for handle in handles:
            poll.register(handle, select.POLLIN)
        num_stopped = dict.fromkeys(self._processes, 0)
        try:
            while True:
                events = poll.poll(_LOOK_PERIOD_S * 1000 if self._processes else None)
                if any(number == self._closed_reader for number, _ in events):
                    return
                if (lost := self._look(num_stopped)) is not None:
                    self._lose(lost)
                    return
        finally:
            for handle in handles:
                os.close(handle)
            os.close(self._closed_reader)

    def _look(self, num_stopped: dict[RayProcess, int]) -> str | None:
        """What is lost now. `num_stopped`: at how many looks in a row each process was stopped."""
        for each in self._processes:
            if not each.process.is_alive():
                return f"{each} {_how_it_ended(each.process)}"
            num_stopped[each] = num_stopped[each] + 1 if each.process.is_stopped() else 0
            if self._ends_stopped and num_stopped[each] >= _NUM_STOPPED_LOOKS:
                each.process.send(signal.SIGKILL)
                return f"{each} was stopped by a signal and has been killed"
        return None

    def _lose(self, what: str) -> None:
        error = EngineError(f"{what}: the engine cannot go on without it", code=RAY_DIED)
        log.info("%s", error)  # no louder: a program may end its Ray by itself, and whoever needs it gets the error
        with self._lock:
            self._error = error
            listeners, self._listeners = self._listeners, []
        for listener in listeners:
            try:
                listener(error)
            except Exception:
                log.exception("a listener for the loss of Ray failed")

    def _forget(self, listener: LossListener) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._listeners.remove(listener)


def _open_handle(process: Process) -> int | None:
    """A descriptor that can be read once the process has ended; None where the system has none, or it is gone."""
    try:
        handle = os.pidfd_open(process.pid)
    except (OSError, AttributeError):
        return None
    if process.is_alive():
        return handle
    os.close(handle)
    return None


def _how_it_ended(process: Process) -> str:
    """`was killed by SIGKILL`, of a child of this process; else `has ended`."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is not None and ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
            return f"was killed by {signal.Signals(ended.si_status).name}"
        if ended is not None:
            return f"ended with exit code {ended.si_status}"
    return "has died"
