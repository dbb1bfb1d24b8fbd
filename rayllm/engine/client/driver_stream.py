"""What one request brings over a connection to a driver."""

from __future__ import annotations

import asyncio
from typing import Protocol

from rayllm.errors import EngineError
from rayllm.messages import READER_PAUSED, TokenDelta
from rayllm.request import Request

_DELTA_BYTES = 256
"""About what a held `TokenDelta` costs beside what it carries."""


class AbortsStreams(Protocol):
    """What a stream needs of its connection."""

    def abort(self, stream: int, pauses: bool) -> None: ...


class DriverStream:
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
        connection: AbortsStreams,
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

    def __aiter__(self) -> DriverStream:
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

    async def __aenter__(self) -> DriverStream:
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
            self._connection.abort(self._first_stream + choice, pauses)
            self._wake()

    def close(self) -> None:
        """Aborts each unfinished choice and forgets what was not taken. Idempotent."""
        for choice in sorted(self._open):
            self.abort_choice(choice)
        self._ready = []

    def add(self, choice: int, delta: TokenDelta) -> None:
        self._ready.append(delta)
        if delta.finish is not None:
            self._open.discard(choice)
        if self._max_held_bytes is not None and not self._begins_late:
            self._num_held_bytes += _num_bytes(delta)
            if self._num_held_bytes > self._max_held_bytes and self._open:
                self.fail(EngineError("the client reads more slowly than the engine writes", code=READER_PAUSED))
                for open_choice in sorted(self._open):
                    self.abort_choice(open_choice, pauses=True)
        self._wake()

    def fail(self, error: EngineError) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _num_bytes(delta: TokenDelta) -> int:
    """About what a delta takes while nobody reads it."""
    logprobs = sum(len(entry.ids) + len(entry.values) + _DELTA_BYTES for entry in delta.logprobs or ())
    return _DELTA_BYTES + len(delta.token_ids) + logprobs
