"""A connection to a driver for asyncio programs: one duplex socket, many requests on it. No Ray in here."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec

from rayllm.engine.address import MAX_CLIENT_FRAME_BYTES, DriverAddress
from rayllm.engine.client.driver_stream import DriverStream
from rayllm.engine.client.endpoint import DRIVER, client_name, endpoint
from rayllm.errors import EngineError, EngineUnreachableError
from rayllm.executor.channel import (
    FrameReader,
    FrameTooLargeError,
    FrameWriter,
)
from rayllm.messages import (
    Abort,
    Adopt,
    Adopted,
    DriverMessage,
    EngineStats,
    Forget,
    Hello,
    IngressReport,
    ResetPrefixCache,
    StatsQuery,
    Submit,
)
from rayllm.request import MAX_CHOICES, Request

CONNECT_TIMEOUT_S = 10.0
STATS_TIMEOUT_S = 10.0


class _Wire(asyncio.BufferedProtocol):
    """Reads frames straight into the reader's buffer; the loop calls it once for what one read brought."""

    def __init__(self, on_frame: Callable[[memoryview], None], on_lost: Callable[[str], None]):
        self._reader = FrameReader(DRIVER)
        self._on_frame = on_frame
        self._on_lost = on_lost
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are none by inheritance

    def get_buffer(self, sizehint: int) -> Any:  # typeshed asks for a bytearray; any writable buffer serves
        return self._reader.space()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            self._reader.received(nbytes)
            while (frame := self._reader.next_frame()) is not None:
                self._on_frame(frame)
        except (FrameTooLargeError, msgspec.MsgspecError) as error:
            self._on_lost(f"it sent a frame that cannot be decoded: {error}")
            assert self.transport is not None
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost(f"connection lost: {exc}" if exc else "it closed the connection or died")


class DriverConnection:
    """Requests to one driver and their tokens back, for one event loop. Made by `connect`."""

    def __init__(self) -> None:
        self._wire = _Wire(self._take, self._lost)
        self._writer = FrameWriter(MAX_CLIENT_FRAME_BYTES)  # one too long fails alone: the driver would drop the client
        self._decoder = msgspec.msgpack.Decoder(DriverMessage)
        self._next_stream = 0
        self._streams: dict[int, tuple[DriverStream, int]] = {}
        self._tickets = itertools.count(1)
        self._asked: dict[int, asyncio.Future[EngineStats]] = {}
        self._adopting: dict[int, tuple[asyncio.Future[DriverStream | None], int | None]] = {}
        self._welcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lost_reason: str | None = None
        self._gone = asyncio.Event()
        self._on_close: list[Callable[[], object]] = []

    @property
    def lost_reason(self) -> str | None:
        """Why the connection is over; None while it stands."""
        return self._lost_reason

    async def wait_lost(self) -> str:
        """Returns the reason once the connection is over."""
        await self._gone.wait()
        return self._lost_reason or ""

    def submit(self, request: Request, max_held_bytes: int | None = None) -> DriverStream:
        """Sends the request and returns at once; see `DriverStream`. Raises `EngineError` when the driver is gone."""
        self._check_alive()
        first, n = self._next_stream, request.params.n
        stream = DriverStream(self, request, first, max_held_bytes)
        self._send(Submit(first, request))  # raises before anything is kept
        self._next_stream += n
        self._register(stream, first)
        return stream

    async def adopt(
        self, client_key: str, answer_id: str, takes_over: bool = True, max_held_bytes: int | None = None
    ) -> DriverStream | None:
        """The stream, from its first token on, of a request that the driver retains for that client
        (`Request.retention`); None where it retains none of that name, or, unless it `takes_over`, serves it to another
        process. Raises `EngineError` when the driver is gone or does not answer in time.
        """
        self._check_alive()
        first = self._next_stream
        self._next_stream += MAX_CHOICES
        answer: asyncio.Future[DriverStream | None] = asyncio.get_running_loop().create_future()
        self._adopting[first] = answer, max_held_bytes
        self._send(Adopt(first, client_key, answer_id, takes_over))
        try:
            return await asyncio.wait_for(asyncio.shield(answer), STATS_TIMEOUT_S)
        except asyncio.TimeoutError:
            answer.add_done_callback(_close_unwanted)
            message = f"{DRIVER} did not answer within {STATS_TIMEOUT_S:g} s"
            raise EngineError(message, code="engine_timeout") from None
        except asyncio.CancelledError:
            answer.add_done_callback(_close_unwanted)
            raise

    def forget(self, client_key: str, answer_id: str) -> None:
        """Releases a retained request that nobody will adopt. Raises `EngineError` when the driver is gone."""
        self._check_alive()
        self._send(Forget(client_key, answer_id))

    def _register(self, stream: DriverStream, first: int) -> None:
        for choice in range(stream.request.params.n):
            self._streams[first + choice] = stream, choice

    async def stats(self, timeout_s: float = STATS_TIMEOUT_S) -> EngineStats:
        """The driver's stats. Raises `EngineError` when it is gone or does not answer in time."""
        return await self._ask(StatsQuery(next(self._tickets)), timeout_s)

    async def reset_prefix_cache(self) -> None:
        """Has the driver use nothing that was computed before for requests that come after. Raises as `stats` does."""
        await self._ask(ResetPrefixCache(next(self._tickets)), STATS_TIMEOUT_S)

    async def _ask(self, question: StatsQuery | ResetPrefixCache, timeout_s: float) -> EngineStats:
        self._check_alive()
        ticket = question.ticket
        answer = self._asked[ticket] = asyncio.get_running_loop().create_future()
        self._send(question)
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except asyncio.TimeoutError:
            raise EngineError(f"{DRIVER} did not answer within {timeout_s:g} s", code="engine_timeout") from None
        finally:
            self._asked.pop(ticket, None)

    def report(self, report: IngressReport) -> None:
        """Leaves this client's stats with the driver, for others' `stats`. Raises `EngineError` when it is gone."""
        self._check_alive()
        self._send(report)

    def on_close(self, callback: Callable[[], object]) -> None:
        """`callback` is called when `close` is, for what belongs to this connection."""
        self._on_close.append(callback)

    def close(self, reason: str = "this client closed the connection") -> None:
        """Closes the socket: the driver aborts what is open, and open streams end with `EngineError`, for this reason.
        Idempotent.
        """
        self._lost(reason)
        for callback in self._on_close:
            callback()
        if self._wire.transport is not None:
            self._wire.transport.close()

    async def __aenter__(self) -> DriverConnection:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    # ----------------------------------------------------------------------------------------------- the wire

    async def _open(self, address: DriverAddress, name: str, timeout_s: float) -> None:
        where = endpoint(address)
        loop = asyncio.get_running_loop()
        try:
            if isinstance(where, str):
                opening: Awaitable[Any] = loop.create_unix_connection(lambda: self._wire, where)
            else:
                opening = loop.create_connection(lambda: self._wire, *where)
            await asyncio.wait_for(opening, timeout_s)
            self._send(Hello(address.token, name))
            await asyncio.wait_for(self._welcome, timeout_s)
        except (OSError, asyncio.TimeoutError) as error:
            self.close()
            raise EngineUnreachableError(f"no driver answers at {where}: {_cause(error, timeout_s)}") from None
        except EngineError as error:
            raise EngineUnreachableError(f"the driver at {where} refused this client: {error}") from None

    def _send(self, message: msgspec.Struct) -> None:
        assert self._wire.transport is not None
        self._wire.transport.write(bytes(self._writer.frame(message)))

    def _take(self, frame: memoryview) -> None:
        message = self._decoder.decode(frame)
        if isinstance(message, EngineStats):
            answer = self._asked.get(message.ticket)
            if answer is not None and not answer.done():
                answer.set_result(message)
            return
        if isinstance(message, Adopted):
            self._take_adopted(message)
            return
        if not self._welcome.done():
            self._welcome.set_result(None)
        streams = self._streams
        for delta in message.deltas:
            found = streams.get(delta.stream)
            if found is None:
                continue  # aborted: this was on its way
            stream, choice = found
            if delta.finish is not None:
                del streams[delta.stream]
            stream.add(choice, delta)

    def _take_adopted(self, message: Adopted) -> None:
        answer, max_held_bytes = self._adopting.pop(message.stream)
        stream = None
        if message.request is not None:
            stream = DriverStream(self, message.request, message.stream, max_held_bytes, begins_late=True)
            self._register(stream, message.stream)
        answer.set_result(stream)

    def abort(self, stream: int, pauses: bool) -> None:
        if self._streams.pop(stream, None) is not None and self._lost_reason is None:
            self._send(Abort(stream, pauses))

    def _lost(self, reason: str) -> None:
        if self._lost_reason is not None:
            return
        self._lost_reason = reason
        self._gone.set()
        error = self._gone_error()
        streams, self._streams = self._streams, {}
        for stream in {id(stream): stream for stream, _ in streams.values()}.values():
            stream.fail(error)
        adopting = [answer for answer, _ in self._adopting.values()]
        waiting: list[asyncio.Future[Any]] = [*self._asked.values(), *adopting]
        for answer in waiting:
            if not answer.done():
                answer.set_exception(error)
        if not self._welcome.done():
            self._welcome.set_exception(error)
            self._welcome.exception()  # seen: only `connect` waits for it, and it may have given up

    def _check_alive(self) -> None:
        if self._lost_reason is not None:
            raise self._gone_error()

    def _gone_error(self) -> EngineError:
        return EngineError(f"{DRIVER} is gone: {self._lost_reason}", code="engine_gone")


async def connect(
    address: DriverAddress, *, name: str | None = None, timeout_s: float = CONNECT_TIMEOUT_S
) -> DriverConnection:
    """Connects to a driver. Raises `EngineUnreachableError` when nobody answers there or the token is
    wrong.
    """
    connection = DriverConnection()
    await connection._open(address, name or client_name(), timeout_s)
    return connection


def _close_unwanted(adopted: asyncio.Future[DriverStream | None]) -> None:
    """What was adopted for somebody who does not wait any more."""
    if not adopted.cancelled() and adopted.exception() is None and (stream := adopted.result()) is not None:
        stream.close()


def _cause(error: BaseException, timeout_s: float) -> str:
    return f"no answer within {timeout_s:g} s" if isinstance(error, asyncio.TimeoutError) else str(error)
