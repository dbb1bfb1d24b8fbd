"""A connection to a driver for one thread that blocks."""

from __future__ import annotations

import contextlib
import itertools
import socket

import msgspec

from rayllm.engine.address import DriverAddress
from rayllm.engine.client.endpoint import DRIVER, client_name, endpoint
from rayllm.errors import EngineError, EngineUnreachableError
from rayllm.executor.channel import FrameTooLargeError, PeerGoneError
from rayllm.executor.channel import connect as connect_channel
from rayllm.executor.executor import Selectable, wait_readable
from rayllm.messages import Abort, Deltas, DriverMessage, EngineStats, ResetPrefixCache, StatsQuery, Submit, TokenDelta
from rayllm.request import Request

CONNECT_TIMEOUT_S = 10.0
STATS_TIMEOUT_S = 10.0


class BlockingDriverConnection:
    """A driver as one thread sees it (`engine.local.BlockingEngineClient`): the caller numbers its streams, choice
    i of a request is `stream + i`.
    """

    def __init__(self, address: DriverAddress, *, name: str | None = None, timeout_s: float = CONNECT_TIMEOUT_S):
        """Raises `EngineUnreachableError` when nobody answers there or the token is wrong."""
        where = endpoint(address)
        try:
            self._channel = connect_channel(where, address.token, name or client_name(), DRIVER, timeout_s)
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
            raise EngineError(f"{DRIVER} did not answer within {timeout_s} s", code="engine_timeout") from None
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
