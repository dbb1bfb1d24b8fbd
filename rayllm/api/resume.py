"""Streams that outlive their connection: a client that asked for it comes back with `Last-Event-ID`.

Each event of a stream has an id, `ANSWER:NUMBER`. Asked for with `x-rayllm-resume: true`, the answer goes on being
made while its client is away, and what it may not have received is held by the process that makes it. Where that one
is gone, or another is asked, the answer is made again from what the driver keeps (`api.resume_context`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple, Protocol

from rayllm.api.sse import error_event
from rayllm.errors import EngineError, RequestError

RESUME_HEADER = "x-rayllm-resume"
LAST_EVENT_HEADER = "last-event-id"
HOLD_S = 120.0
MAX_UNREAD_BYTES = 256 * 1024
"""What is made in advance for a reader that is slow or away; the answer then waits for it."""
MAX_READ_BYTES = 512 * 1024
"""What is kept although it was written: it may be in buffers on the way, and lost with the connection."""
MAX_BACKGROUND_BYTES = 16 * 2**20
"""What is kept of an answer that waits for no reader."""
_EVENT_END = b"\n\n"


class EventName(NamedTuple):
    """What `Last-Event-ID` says: an answer, and how many of its events were seen."""

    answer_id: str
    number: int
    """-1 for what is no number."""

    @classmethod
    def parse(cls, text: str) -> EventName:
        answer_id, _, number = text.rpartition(":")
        return cls(answer_id, int(number) if number.isascii() and number.isdigit() and len(number) < 12 else -1)

    def __str__(self) -> str:
        return f"{self.answer_id}:{self.number}"


class StreamedAnswer(Protocol):
    """What can be held: `api.answer.Answer`."""

    @property
    def id(self) -> str: ...

    @property
    def is_adopted_by_another(self) -> bool: ...

    def stream(self) -> AsyncIterator[bytes]: ...

    def close(self) -> None: ...


class HeldStream:
    """One answer's events, made by a task of its own and read by one connection after the other.

    `read` may be called again: the reader before it ends. `on_dropped` is called when it is not held any more, or not
    here. With `hold_s=None` it waits for no reader: the answer is made to its end, and held until `drop`. The first
    `num_seen` events are not held.
    """

    def __init__(self, answer: StreamedAnswer, on_dropped: Callable[[], None], hold_s: float | None, num_seen: int = 0):
        self._answer = answer
        self._on_dropped = on_dropped
        self._num_skipped = num_seen
        self._hold_s = hold_s
        self._held: deque[tuple[int, bytes]] = deque()  # number of its first event, and the events
        self._num_made = 0
        self._num_written = num_seen
        self._num_unread_bytes = 0
        self._num_read_bytes = 0
        self._ended = False
        self._changed = asyncio.Event()
        self._reader = 0
        self._timer = self._start_timer()
        self._maker = asyncio.create_task(self._make())

    def made(self, num_seen: int) -> bool:
        """Whether there are that many events, here or where the answer was made first."""
        return 0 <= num_seen <= max(self._num_made, self._num_skipped)

    def holds(self, num_seen: int) -> bool:
        """Whether all events after the first `num_seen` are there or still to come."""
        first = self._held[0][0] if self._held else max(self._num_made, self._num_skipped) + 1
        return first <= num_seen + 1 and self.made(num_seen)

    async def read(self, num_seen: int = 0) -> AsyncIterator[bytes]:
        """The events after the first `num_seen`, which must be held, or be made again."""
        self._reader = reader = self._reader + 1
        self._change()
        self._stop_timer()
        try:
            while reader == self._reader:
                if self._ended and num_seen > self._num_made:
                    yield error_event(EngineError(f"there are {self._num_made} events only", code="events_lost"))
                    return
                if not self.holds(num_seen):  # it waits for no reader, and this one was too slow
                    yield error_event(EngineError("events were let go before they were read", code="events_lost"))
                    return
                piece = self._piece_after(num_seen)
                if piece:
                    num_seen += piece.count(_EVENT_END)
                    yield piece
                    self._note_written(num_seen)
                elif self._ended:
                    return
                else:
                    await self._changed.wait()
        finally:
            if reader == self._reader:
                self._timer = self._start_timer()

    def end(self, last: bytes) -> None:
        """Ends the answer, where it has not ended, with these last events; what was made of it stays held."""
        if not self._ended:
            self._ended = True
            self._maker.cancel()
            self._keep(last)
            self._change()

    def drop(self) -> None:
        """Ends the answer and forgets it."""
        self._reader += 1
        self._stop_timer()
        self._ended = True
        self._maker.cancel()
        self._answer.close()
        self._change()
        self._on_dropped()

    @property
    def num_bytes(self) -> int:
        return self._num_unread_bytes + self._num_read_bytes

    def _start_timer(self) -> asyncio.TimerHandle | None:
        if self._hold_s is None:
            return None
        return asyncio.get_running_loop().call_later(self._hold_s, self.drop)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def _make(self) -> None:
        try:
            async for piece in self._answer.stream():
                self._keep(piece)
                self._change()
                if self._hold_s is None:
                    self._drop_oldest(MAX_BACKGROUND_BYTES)
                    continue
                while self._num_unread_bytes > MAX_UNREAD_BYTES:
                    await self._changed.wait()
        finally:
            self._ended = True
            self._answer.close()
            self._change()
            if self._answer.is_adopted_by_another:
                self._on_dropped()

    def _keep(self, piece: bytes) -> None:
        first = self._num_made + 1
        self._num_made += piece.count(_EVENT_END)
        if self._num_made <= self._num_skipped:
            return
        self._held.append((first, piece))
        self._num_unread_bytes += len(piece)

    def _piece_after(self, num_seen: int) -> bytes:
        if num_seen >= self._num_made:
            return b""
        first, piece = next(held for held in reversed(self._held) if held[0] <= num_seen + 1)
        if first == num_seen + 1:
            return piece
        return b"".join(event + _EVENT_END for event in piece.split(_EVENT_END)[num_seen + 1 - first : -1])

    def _note_written(self, num_written: int) -> None:
        """Counts what was written for the first time, and lets go of the oldest of it where it is too much."""
        for first, piece in reversed(self._held):
            if first <= self._num_written:
                break
            if first <= num_written:
                self._num_unread_bytes -= len(piece)
                self._num_read_bytes += len(piece)
        self._num_written = max(self._num_written, num_written)
        if self._hold_s is not None:
            while self._num_read_bytes > MAX_READ_BYTES:
                self._num_read_bytes -= len(self._held.popleft()[1])
        self._change()

    def _drop_oldest(self, num_bytes: int) -> None:
        """Of the oldest, until no more than that is held."""
        while self.num_bytes > num_bytes:
            first, piece = self._held.popleft()
            if first <= self._num_written:
                self._num_read_bytes -= len(piece)
            else:
                self._num_unread_bytes -= len(piece)

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class HeldStreams:
    """The streams that one process holds."""

    def __init__(self, hold_s: float = HOLD_S):
        self._hold_s = hold_s
        self._streams: dict[tuple[str, str], HeldStream] = {}

    def hold(
        self,
        answer: StreamedAnswer,
        client_key: str,
        *,
        background: bool = False,
        num_seen: int = 0,
        on_dropped: Callable[[], None] = lambda: None,
    ) -> HeldStream:
        """`client_key`: whose it is; nobody else can resume it. `background`: it waits for no reader, and is held
        until `drop`. `num_seen`: events that were sent by another process. `on_dropped` is called when it is not held
        any more, or goes on elsewhere."""
        key = client_key, answer.id

        def forget() -> None:
            if self._streams.get(key) is stream:
                del self._streams[key]
                on_dropped()

        stream = HeldStream(answer, forget, None if background else self._hold_s, num_seen)
        self._streams[key] = stream
        return stream

    def find(self, name: EventName, client_key: str) -> AsyncIterator[bytes] | None:
        """The events after that one; None where they are not held here. Raises `RequestError` (404) for an event that
        was never made."""
        stream = self._streams.get((client_key, name.answer_id))
        if stream is None and name.number >= 0:
            return None
        if stream is None or not stream.made(name.number):
            raise self.not_held(name)
        return stream.read(name.number) if stream.holds(name.number) else None

    def not_held(self, name: EventName) -> RequestError:
        """That the events after that one are not there."""
        return RequestError(
            f"no events are held after {str(name)[:100]!r}: they are kept for {self._hold_s:g} s where "
            f"{RESUME_HEADER}: true asked for it; send the request anew, without Last-Event-ID",
            param=LAST_EVENT_HEADER,
            code="resume_not_found",
            status=404,
        )

    def drop(self, answer_id: str, client_key: str) -> bool:
        """Ends and forgets it; False where it is not held."""
        stream = self._streams.get((client_key, answer_id))
        if stream is None:
            return False
        stream.drop()
        return True

    def close(self) -> None:
        for stream in list(self._streams.values()):
            stream.drop()
