"""A client of an engine that survives the death of its driver: open requests continue on the next one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import NoReturn

import anyio

from rayllm.engine.client.driver_connection import DriverConnection
from rayllm.engine.client.driver_stream import DriverStream
from rayllm.engine.client.journal import Journal, is_fault
from rayllm.errors import EngineError, RayLLMError
from rayllm.messages import READER_PAUSED, EngineStats, IngressReport, TokenDelta
from rayllm.request import Request

log = logging.getLogger(__name__)

ReplayListener = Callable[[float, int], None]

RETRY_S = 0.05
MAX_HELD_BYTES = 128 * 1024


class JournaledClient:
    """An engine whatever driver it has: `attach` gives it one, `detach` says that it is lost; `keep_attached` does
    both.

    A request that meets no driver waits up to `driver_wait_s` (and no longer than its deadline), then its stream
    raises `EngineError`. `on_replay` hears, for each request and fault, the seconds from the loss to the next delta,
    and how many known tokens were computed again.
    """

    def __init__(self, driver_wait_s: float = 60.0, on_replay: ReplayListener = lambda gap_s, num_tokens: None):
        self._driver_wait_s = driver_wait_s
        self.on_replay = on_replay
        self.driver: DriverConnection | None = None
        self._lost_reason = "no driver has started yet"
        self._attached = asyncio.Event()
        self._ended: EngineError | None = None

    def attach(self, driver: DriverConnection) -> None:
        """Requests go to this driver from now on."""
        self.driver = driver
        self._wake()

    def detach(self, reason: str) -> None:
        """The driver is lost; requests wait for the next one. Called again, it is known better why there is none."""
        self.driver = None
        self._lost_reason = reason

    def end(self, error: EngineError) -> None:
        """No driver will do any more: a request whose driver is lost, now or later, ends with this error."""
        self._ended = error
        self._wake()

    def _wake(self) -> None:
        self._attached.set()
        self._attached = asyncio.Event()  # the next wait is for the next driver

    def submit(self, request: Request) -> JournaledStream:
        """Returns at once, with or without a driver."""
        return JournaledStream(self, Journal(request))

    async def adopt(self, client_key: str, answer_id: str, takes_over: bool = True) -> JournaledStream | None:
        """The stream, from its first token on, of a request that this driver retains for that client
        (`Request.retention`); None where it retains none of that name, or, unless it `takes_over`, serves it to another
        process. Raises `EngineError` where there is no driver."""
        driver = self._driver()
        stream = await driver.adopt(client_key, answer_id, takes_over, MAX_HELD_BYTES)
        return None if stream is None else JournaledStream(self, Journal(stream.request), (driver, stream))

    def forget(self, client_key: str, answer_id: str) -> None:
        """Releases a retained request that nobody will adopt."""
        if self.driver is not None:
            with contextlib.suppress(EngineError):
                self.driver.forget(client_key, answer_id)

    async def stats(self) -> EngineStats:
        """The driver's stats. Raises `EngineError` where there is none."""
        return await self._driver().stats()

    def _driver(self) -> DriverConnection:
        if self.driver is None:
            raise EngineError(f"the engine has no driver: {self._lost_reason}", code="engine_gone")
        return self.driver

    def report(self, report: IngressReport) -> None:
        """Leaves this process's stats with the driver, where there is one."""
        if self.driver is not None:
            with contextlib.suppress(EngineError):
                self.driver.report(report)

    async def next_driver(self, after: DriverConnection | None, deadline_s: float | None) -> DriverConnection:
        """The driver, once there is one that is not `after`."""
        wait_s = self._driver_wait_s
        if deadline_s is not None:
            wait_s = min(wait_s, max(0.0, deadline_s - time.time()))
        try:
            with anyio.fail_after(wait_s):  # asyncio.wait_for may swallow a cancellation, before Python 3.12
                return await self._other_than(after)
        except TimeoutError:
            if deadline_s is not None and deadline_s <= time.time():
                message = "the request's deadline passed before it was finished"
                raise EngineError(message, code="deadline_exceeded") from None
            message = (
                f"the engine has no driver after waiting {wait_s:g} s (driver_wait_s={self._driver_wait_s:g}): "
                f"{self._lost_reason}"
            )
            raise EngineError(message, code="engine_gone") from None

    async def keep_attached(
        self,
        connect: Callable[[], Awaitable[DriverConnection]],
        on_unreachable: Callable[[Exception], Awaitable[None]],
        on_attached: Callable[[], None] = lambda: None,
        on_lost: Callable[[str], None] = lambda reason: None,
    ) -> NoReturn:
        """Attaches the driver that `connect` finds, the next one when it is lost, and so on until cancelled.

        Where `connect` fails it is tried again, unless `on_unreachable` raises. Call `end` afterwards.
        """
        while True:
            try:
                connection = await connect()
            except Exception as error:  # whatever it is: the next driver may do better
                if not isinstance(error, (RayLLMError, OSError, asyncio.TimeoutError)):
                    log.exception("connecting to the engine failed")
                self.detach(str(error))
                await on_unreachable(error)
                await asyncio.sleep(RETRY_S)
                continue
            try:
                self.attach(connection)
                on_attached()
                reason = await connection.wait_lost()
                self.detach(reason)
            finally:
                connection.close()
            log.warning("lost the connection to the engine's driver: %s", reason)
            on_lost(reason)

    async def _other_than(self, lost: DriverConnection | None) -> DriverConnection:
        while self._ended is None:
            if self.driver is not None and self.driver is not lost:
                return self.driver
            await self._attached.wait()
        raise self._ended


class JournaledStream:
    """What a request brings, over as many drivers as it takes: the interface of `engine.client.RequestStream`.
    `begun`: a driver that serves it already, and the stream there."""

    def __init__(
        self, engine: JournaledClient, journal: Journal, begun: tuple[DriverConnection, DriverStream] | None = None
    ):
        self.journal = journal
        self._engine = engine
        self._driver: DriverConnection | None = None
        self._stream: DriverStream | None = None
        self._submitted = False
        self._lost_s: float | None = None
        self._num_replayed = 0
        if begun is not None:
            self._driver, self._stream = begun
            self._submitted = True
        elif engine.driver is not None:
            with contextlib.suppress(EngineError):  # lost, and not yet known to be: wait for another
                self._submit(engine.driver, journal.request)

    def __aiter__(self) -> JournaledStream:
        return self

    async def __anext__(self) -> list[TokenDelta]:
        while not self.journal.finished:
            stream = self._stream or await self._continue()
            try:
                deltas = await stream.__anext__()
            except EngineError as error:
                self._pause(error)
                continue
            fault = next((delta.finish for delta in deltas if is_fault(delta.finish)), None)
            news = self.journal.append([delta for delta in deltas if not is_fault(delta.finish)])
            if fault is not None:
                self._pause(EngineError(fault.message or "the engine failed", code=fault.code or "engine_error"))
            if news:
                self._note_replay()
                return news
        raise StopAsyncIteration

    @property
    def request(self) -> Request:
        return self.journal.request

    def abort_choice(self, choice: int) -> None:
        """Wants no more of this choice. Idempotent."""
        self.journal.choices[choice].wanted = False
        if self._stream is not None:
            self._stream.abort_choice(choice)

    def close(self) -> None:
        """Aborts what is unfinished. Idempotent."""
        for choice in self.journal.choices:
            choice.wanted = False
        if self._stream is not None:
            self._stream.close()

    def _submit(self, driver: DriverConnection, request: Request) -> DriverStream:
        self._driver = driver
        self._stream = stream = driver.submit(request, MAX_HELD_BYTES)
        self._submitted = True
        return stream

    async def _continue(self) -> DriverStream:
        """Submits the request again, to the next driver or, after a pause of the reader's own, to the same."""
        journal = self.journal
        while True:
            driver = await self._engine.next_driver(self._driver, journal.request.deadline_s)
            try:
                stream = self._submit(driver, journal.continuation() if self._submitted else journal.request)
            except EngineError:
                continue  # lost between two turns
            for number, choice in enumerate(journal.choices):
                if not choice.open:
                    stream.abort_choice(number)
            self._num_replayed = journal.num_tokens
            return stream

    def _pause(self, error: EngineError) -> None:
        """The stream of this driver is over. Raises for a request that was running at too many faults."""
        assert self._stream is not None
        self._stream.close()
        self._stream = None
        if error.code == READER_PAUSED:
            self._driver = None  # the same driver will do
            return
        self.journal.note_fault(error)
        if self._lost_s is None:
            self._lost_s = time.monotonic()

    def _note_replay(self) -> None:
        if self._lost_s is not None:
            gap_s = time.monotonic() - self._lost_s
            self._lost_s = None
            self._engine.on_replay(gap_s, self._num_replayed)
            log.warning(
                "resumed on another driver after %.2f s; recomputing %d tokens",
                gap_s,
                self._num_replayed,
                extra={"request_id": self.journal.request.log_id},
            )
