"""The journal of open requests, and a client that survives the death of the engine's driver.

A request's journal holds what was asked and what was delivered; everything else about it is recomputed from that.
When a driver is lost, each open request is submitted to the next one with the ids that were delivered, and its stream
continues where it was: no token is lost, repeated or changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

import anyio
import msgspec

from rayllm.engine.delta_history import DeltaHistory
from rayllm.errors import EngineError, RayLLMError
from rayllm.messages import READER_PAUSED, EngineStats, Finish, IngressReport, TokenDelta
from rayllm.request import Request

log = logging.getLogger(__name__)

RETRY_S = 0.05
MAX_FAULTS = 3
MAX_HELD_BYTES = 128 * 1024
_LOST_CODES = frozenset({"engine_gone", "engine_error", "worker_died", READER_PAUSED})
"""Codes of `Finish` by which a driver says that it is lost itself, or has paused a request, not that it refuses it."""


@dataclass(slots=True)
class ChoiceLine:
    """One choice as far as it was sent on."""

    token_ids: array[int] = field(default_factory=lambda: array("i"))
    finish: Finish | None = None
    wanted: bool = True
    """False once the reader wants no more of it."""

    @property
    def open(self) -> bool:
        return self.wanted and self.finish is None

    def append(self, delta: TokenDelta) -> None:
        self.token_ids.frombytes(delta.token_ids)
        self.finish = delta.finish


ReplayListener = Callable[[float, int], None]


class Journal:
    """One request's line. `append` comes before anything is sent on."""

    def __init__(self, request: Request):
        self.request = request
        self.choices = [ChoiceLine() for _ in range(request.params.n)]
        self.history = DeltaHistory() if request.retention is not None else None
        self.has_prompt_logprobs = False
        self.num_faults = 0
        """Drivers that were lost while the request may have been running there."""
        self._may_run = True

    @property
    def finished(self) -> bool:
        return not any(choice.open for choice in self.choices)

    @property
    def num_tokens(self) -> int:
        """Known tokens of open choices, the prompt once."""
        return len(self.request.prompt) // 4 + sum(len(choice.token_ids) for choice in self.choices if choice.open)

    def append(self, deltas: list[TokenDelta]) -> list[TokenDelta]:
        """Writes down what came and returns what of it is to be sent on: deltas of open choices."""
        self._may_run |= bool(deltas)
        news = [delta for delta in deltas if self.choices[delta.choice].open and not delta.is_start]
        for delta in news:
            self.choices[delta.choice].append(delta)
            self.has_prompt_logprobs |= delta.prompt_logprobs is not None
            if self.history is not None:
                self.history.append(delta.choice, delta)
        return news

    def note_fault(self, error: EngineError) -> None:
        """The request's driver is lost. Raises for a request that may have been running at too many faults: at the
        first driver it may always, at later ones when it was said to, or when the driver itself says that it failed."""
        if not self._may_run and error.code != "engine_error":
            return
        self.num_faults += 1
        log.warning("lost the connection to the driver: %s", error, extra={"request_id": self.request.log_id})
        if self.num_faults >= MAX_FAULTS:
            raise EngineError(
                f"the engine failed {MAX_FAULTS} times while this request was running, so it is not retried; "
                f"last failure: {error}",
                code="poison_request",
            )

    def continuation(self) -> Request:
        """The request as the next driver must see it. Choices that are not `open` must be aborted right after."""
        self._may_run = False
        params = self.request.params
        if self.has_prompt_logprobs:
            params = params.with_(prompt_logprobs=None)
        emitted = tuple(choice.token_ids.tobytes() for choice in self.choices)
        retention = self.request.retention
        if retention is not None and self.history is not None:
            if self.history.is_too_long:
                retention = None
            else:
                retention = msgspec.structs.replace(retention, history=self.history.encode())
        return msgspec.structs.replace(self.request, params=params, emitted=emitted, retention=retention)


class DeltaStream(Protocol):
    """The deltas of one request from one driver: `engine.client.RequestStream`."""

    def __aiter__(self) -> AsyncIterator[list[TokenDelta]]: ...

    async def __anext__(self) -> list[TokenDelta]: ...

    def abort_choice(self, choice: int) -> None: ...

    def close(self) -> None: ...


class AdoptedStream(DeltaStream, Protocol):
    """The deltas of a kept request, from its first token on."""

    @property
    def request(self) -> Request: ...


class DriverConnection(Protocol):
    """One driver, until it is lost: `engine.client.EngineConnection`."""

    def submit(self, request: Request, max_held_bytes: int | None = None) -> DeltaStream: ...

    async def adopt(
        self, client_key: str, answer_id: str, takes_over: bool = True, max_held_bytes: int | None = None
    ) -> AdoptedStream | None: ...

    def forget(self, client_key: str, answer_id: str) -> None: ...

    async def stats(self) -> EngineStats: ...

    async def reset_prefix_cache(self) -> None: ...

    def report(self, report: IngressReport) -> None: ...


class LosableConnection(DriverConnection, Protocol):
    """A driver whose loss is told: `engine.client.EngineConnection`."""

    async def wait_lost(self) -> str: ...

    def close(self) -> None: ...


class JournaledEngine:
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
        connect: Callable[[], Awaitable[LosableConnection]],
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
        self, engine: JournaledEngine, journal: Journal, begun: tuple[DriverConnection, DeltaStream] | None = None
    ):
        self.journal = journal
        self._engine = engine
        self._driver: DriverConnection | None = None
        self._stream: DeltaStream | None = None
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

    def _submit(self, driver: DriverConnection, request: Request) -> DeltaStream:
        self._driver = driver
        self._stream = stream = driver.submit(request, MAX_HELD_BYTES)
        self._submitted = True
        return stream

    async def _continue(self) -> DeltaStream:
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


def is_fault(finish: Finish | None) -> bool:
    """Whether these are a driver's last words about a request that is to be submitted again, not a refusal."""
    return finish is not None and finish.reason == "error" and finish.code in _LOST_CODES
