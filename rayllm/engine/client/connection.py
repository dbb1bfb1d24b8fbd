"""A client of a driver: one duplex socket for a client process and a driver, many requests on it.

`EngineConnection` is for an asyncio program (an ingress), `BlockingConnection` for one thread that blocks
(`LLM`). No Ray in here but to find an engine by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec

from rayllm.config import RAY_NAMESPACE
from rayllm.engine.address import MAX_CLIENT_FRAME_BYTES, DriverAddress
from rayllm.errors import EngineError, EngineUnreachableError
from rayllm.executor.channel import (
    Address,
    FrameReader,
    FrameTooLargeError,
    FrameWriter,
    PeerGoneError,
)
from rayllm.executor.channel import (
    connect as connect_channel,
)
from rayllm.executor.executor import Selectable, wait_readable
from rayllm.messages import (
    READER_PAUSED,
    Abort,
    Adopt,
    Adopted,
    Deltas,
    DriverMessage,
    EngineStats,
    Forget,
    Hello,
    IngressReport,
    ResetPrefixCache,
    StatsQuery,
    Submit,
    TokenDelta,
)
from rayllm.request import MAX_CHOICES, Request

CONNECT_TIMEOUT_S = 10.0
STATS_TIMEOUT_S = 10.0
_DELTA_BYTES = 256
"""About what a held `TokenDelta` costs beside what it carries."""
_PEER = "the engine's driver"


class RequestStream:
    """What a request brings, as an async iterator of lists of `TokenDelta` whose `stream` is the choice, from
    0.

    A list holds all that came since the last one was taken, in order. It ends after each choice has had its
    `Finish` or was aborted; when the driver is lost, `EngineError` is raised after what came before. Close it
    when done early: `close` is also the end of `async with`.

    A reader that leaves more than `max_held_bytes` untaken is paused: the request is aborted at the driver, and after
    what came before, `EngineError` with code `READER_PAUSED` is raised. None: it may leave all of it. What comes before
    the first is taken does not count where it `begins_late`: with all that others had of the request.
    """

    def __init__(
        self,
        connection: EngineConnection,
        request: Request,
        first_stream: int,
        max_held_bytes: int | None = None,
        begins_late: bool = False,
    ):
        self.request = request
        self.request_id = request.request_id
        self._connection = connection
        self._first_stream = first_stream
        self._open = set(range(request.params.n))
        self._ready: list[TokenDelta] = []
        self._max_held_bytes = max_held_bytes
        self._begins_late = begins_late
        self._num_held_bytes = 0
        self._error: EngineError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> list[TokenDelta]:
        while not self._ready:
            if self._error is not None:
                raise self._error
            if not self._open:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        ready, self._ready, self._num_held_bytes = self._ready, [], 0
        self._begins_late = False
        return ready

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def finished(self) -> bool:
        """Whether nothing more will come; what came may not have been taken yet."""
        return not self._open or self._error is not None

    def abort_choice(self, choice: int, pauses: bool = False) -> None:
        """Wants no more of this choice (for now, where it `pauses`); nothing of it comes after what came already.
        Idempotent."""
        if choice in self._open:
            self._open.discard(choice)
            self._connection._abort(self._first_stream + choice, pauses)
            self._wake()

    def close(self) -> None:
        """Aborts each unfinished choice and forgets what was not taken. Idempotent."""
        for choice in sorted(self._open):
            self.abort_choice(choice)
        self._ready = []

    def _add(self, choice: int, delta: TokenDelta) -> None:
        self._ready.append(delta)
        if delta.finish is not None:
            self._open.discard(choice)
        if self._max_held_bytes is not None and not self._begins_late:
            self._num_held_bytes += _num_bytes(delta)
            if self._num_held_bytes > self._max_held_bytes and self._open:
                self._fail(EngineError("the client reads more slowly than the engine writes", code=READER_PAUSED))
                for open_choice in sorted(self._open):
                    self.abort_choice(open_choice, pauses=True)
        self._wake()

    def _fail(self, error: EngineError) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Wire(asyncio.BufferedProtocol):
    """Reads frames straight into the reader's buffer; the loop calls it once for what one read brought."""

    def __init__(self, on_frame: Callable[[memoryview], None], on_lost: Callable[[str], None]):
        self._reader = FrameReader(_PEER)
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


class EngineConnection:
    """Requests to one driver and their tokens back, for one event loop. Made by `connect`."""

    def __init__(self) -> None:
        self._wire = _Wire(self._take, self._lost)
        self._writer = FrameWriter(MAX_CLIENT_FRAME_BYTES)  # one too long fails alone: the driver would drop the client
        self._decoder = msgspec.msgpack.Decoder(DriverMessage)
        self._next_stream = 0
        self._streams: dict[int, tuple[RequestStream, int]] = {}
        self._tickets = itertools.count(1)
        self._asked: dict[int, asyncio.Future[EngineStats]] = {}
        self._adopting: dict[int, tuple[asyncio.Future[RequestStream | None], int | None]] = {}
        self._welcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lost_reason: str | None = None
        self._gone = asyncio.Event()
        self.watcher: asyncio.Task[None] | None = None
        """Looks whether the driver still is the engine's; held here, so that it lives as long as the connection."""

    @property
    def lost_reason(self) -> str | None:
        """Why the connection is over; None while it stands."""
        return self._lost_reason

    async def wait_lost(self) -> str:
        """Returns the reason once the connection is over."""
        await self._gone.wait()
        return self._lost_reason or ""

    def submit(self, request: Request, max_held_bytes: int | None = None) -> RequestStream:
        """Sends the request and returns at once; see `RequestStream`. Raises `EngineError` when the driver is gone."""
        self._check_alive()
        first, n = self._next_stream, request.params.n
        stream = RequestStream(self, request, first, max_held_bytes)
        self._send(Submit(first, request))  # raises before anything is kept
        self._next_stream += n
        self._register(stream, first)
        return stream

    async def adopt(
        self, client_key: str, answer_id: str, takes_over: bool = True, max_held_bytes: int | None = None
    ) -> RequestStream | None:
        """The stream, from its first token on, of a request that the driver retains for that client
        (`Request.retention`); None where it retains none of that name, or, unless it `takes_over`, serves it to another
        process. Raises `EngineError` when the driver is gone or does not answer in time.
        """
        self._check_alive()
        first = self._next_stream
        self._next_stream += MAX_CHOICES
        answer: asyncio.Future[RequestStream | None] = asyncio.get_running_loop().create_future()
        self._adopting[first] = answer, max_held_bytes
        self._send(Adopt(first, client_key, answer_id, takes_over))
        try:
            return await asyncio.wait_for(asyncio.shield(answer), STATS_TIMEOUT_S)
        except asyncio.TimeoutError:
            answer.add_done_callback(_close_unwanted)
            message = f"{_PEER} did not answer within {STATS_TIMEOUT_S:g} s"
            raise EngineError(message, code="engine_timeout") from None
        except asyncio.CancelledError:
            answer.add_done_callback(_close_unwanted)
            raise

    def forget(self, client_key: str, answer_id: str) -> None:
        """Releases a retained request that nobody will adopt. Raises `EngineError` when the driver is gone."""
        self._check_alive()
        self._send(Forget(client_key, answer_id))

    def _register(self, stream: RequestStream, first: int) -> None:
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
            raise EngineError(f"{_PEER} did not answer within {timeout_s:g} s", code="engine_timeout") from None
        finally:
            self._asked.pop(ticket, None)

    def report(self, report: IngressReport) -> None:
        """Leaves this client's stats with the driver, for others' `stats`. Raises `EngineError` when it is gone."""
        self._check_alive()
        self._send(report)

    def close(self, reason: str = "this client closed the connection") -> None:
        """Closes the socket: the driver aborts what is open, and open streams end with `EngineError`, for this reason.
        Idempotent.
        """
        self._lost(reason)
        if self.watcher is not None:
            self.watcher.cancel()
        if self._wire.transport is not None:
            self._wire.transport.close()

    async def __aenter__(self) -> EngineConnection:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    # ----------------------------------------------------------------------------------------------- the wire

    async def _open(self, address: DriverAddress, name: str, timeout_s: float) -> None:
        where = _where(address)
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
            stream._add(choice, delta)

    def _take_adopted(self, message: Adopted) -> None:
        answer, max_held_bytes = self._adopting.pop(message.stream)
        stream = None
        if message.request is not None:
            stream = RequestStream(self, message.request, message.stream, max_held_bytes, begins_late=True)
            self._register(stream, message.stream)
        answer.set_result(stream)

    def _abort(self, stream: int, pauses: bool) -> None:
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
            stream._fail(error)
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
        return EngineError(f"{_PEER} is gone: {self._lost_reason}", code="engine_gone")


async def connect(
    address: DriverAddress, *, name: str | None = None, timeout_s: float = CONNECT_TIMEOUT_S
) -> EngineConnection:
    """Connects to a driver. Raises `EngineUnreachableError` when nobody answers there or the token is
    wrong.
    """
    connection = EngineConnection()
    await connection._open(address, name or _client_name(), timeout_s)
    return connection


async def connect_by_name(engine: str, *, name: str | None = None, namespace: str = RAY_NAMESPACE) -> EngineConnection:
    """Connects to the engine of that name in this process's Ray cluster. Raises `EngineUnreachableError`."""
    import ray

    from rayllm.engine.client.follow import leave_when_replaced
    from rayllm.engine.discovery import find_address

    address = await find_address(engine, namespace)
    connection = await connect(address, name=name)
    if address.node_id != ray.get_runtime_context().get_node_id():
        connection.watcher = asyncio.create_task(leave_when_replaced(connection, address.token, engine, namespace))
    return connection


class BlockingConnection:
    """A driver as one thread sees it (`engine.local.BlockingEngine`): the caller numbers its streams, choice
    i of a request is `stream + i`.
    """

    def __init__(self, address: DriverAddress, *, name: str | None = None, timeout_s: float = CONNECT_TIMEOUT_S):
        """Raises `EngineUnreachableError` when nobody answers there or the token is wrong."""
        where = _where(address)
        try:
            self._channel = connect_channel(where, address.token, name or _client_name(), _PEER, timeout_s)
        except OSError as error:
            raise EngineUnreachableError(f"no driver answers at {where}: {error}") from None
        self._decoder = msgspec.msgpack.Decoder(DriverMessage)
        self._tickets = itertools.count(1)
        self._deltas: list[TokenDelta] = []
        try:
            self._channel.receive(timeout_s)
        except OSError as error:  # a TimeoutError is one too
            self._channel.close()
            raise EngineUnreachableError(f"the driver at {where} refused this client: {error}") from None

    def submit(self, stream: int, request: Request) -> None:
        """Raises `EngineError` when the driver is gone."""
        self._send(Submit(stream, request))

    def abort(self, stream: int) -> None:
        """Wants no more of the choice with this number; deltas on their way may still come."""
        self._send(Abort(stream))

    def receive(self, wake: Selectable | None = None) -> list[TokenDelta]:
        """The next deltas; waits for some, or until `wake` is readable. Raises `EngineError` when the driver is
        gone."""
        channel = self._channel
        while not self._deltas:
            if wake is not None and not channel.has_frame and channel not in wait_readable(channel, wake):
                return []
            self._take(None)
        deltas, self._deltas = self._deltas, []
        return deltas

    def stats(self, timeout_s: float = STATS_TIMEOUT_S) -> EngineStats:
        """The driver's stats. Raises `EngineError` when it is gone or does not answer in time."""
        return self._ask(StatsQuery(next(self._tickets)), timeout_s)

    def reset_prefix_cache(self) -> None:
        """Has the driver use nothing that was computed before for requests that come after. Raises as `stats` does."""
        self._ask(ResetPrefixCache(next(self._tickets)), STATS_TIMEOUT_S)

    def _ask(self, question: StatsQuery | ResetPrefixCache, timeout_s: float) -> EngineStats:
        self._send(question)
        while True:
            answer = self._take(timeout_s)
            if answer is not None and answer.ticket == question.ticket:
                return answer

    @property
    def is_closed(self) -> bool:
        return self._channel.fileno() < 0

    def cut(self) -> None:
        """Ends the connection for the thread that waits in it, which meets an `EngineError`; called by another."""
        with contextlib.suppress(OSError):
            self._channel.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """The driver aborts what is open; a call that waits on another thread fails. Idempotent."""
        self._channel.close()

    def _take(self, timeout_s: float | None) -> EngineStats | None:
        try:
            message = self._decoder.decode(self._channel.receive(timeout_s))
        except TimeoutError:
            raise EngineError(f"{_PEER} did not answer within {timeout_s} s", code="engine_timeout") from None
        except (PeerGoneError, FrameTooLargeError) as error:
            raise EngineError(str(error), code="engine_gone") from None
        if isinstance(message, EngineStats):
            return message
        if isinstance(message, Deltas):
            self._deltas += message.deltas
        return None

    def _send(self, message: msgspec.Struct) -> None:
        try:
            self._channel.send(message)
        except PeerGoneError as error:
            raise EngineError(str(error), code="engine_gone") from None


def _close_unwanted(adopted: asyncio.Future[RequestStream | None]) -> None:
    """What was adopted for somebody who does not wait any more."""
    if not adopted.cancelled() and adopted.exception() is None and (stream := adopted.result()) is not None:
        stream.close()


def _num_bytes(delta: TokenDelta) -> int:
    """About what a delta takes while nobody reads it."""
    logprobs = sum(len(entry.ids) + len(entry.values) + _DELTA_BYTES for entry in delta.logprobs or ())
    return _DELTA_BYTES + len(delta.token_ids) + logprobs


def _where(address: DriverAddress) -> Address:
    """The Unix socket where it can be seen from here, else TCP. Raises `EngineUnreachableError`."""
    if os.path.exists(address.unix_path):
        return address.unix_path
    if address.host is not None and address.port is not None:
        return address.host, address.port
    raise EngineUnreachableError(
        f"the driver on node {address.node_id[:8]} listens at {address.unix_path}, which is not here: "
        "it has ended, or this process is on another node and must ask the driver again"
    )


def _client_name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _cause(error: BaseException, timeout_s: float) -> str:
    return f"no answer within {timeout_s:g} s" if isinstance(error, asyncio.TimeoutError) else str(error)
