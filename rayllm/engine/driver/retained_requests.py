"""Requests that outlive their client: what a driver keeps of an answer whose ingress may die.

A request that says so (`Request.keep`) is mirrored with all that was sent on of it. When its client is gone it goes on,
and another client may adopt it: that one is sent everything from the first token. Plain Python; time is given.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from rayllm.messages import Finish, TokenDelta, TokenLogprobs
from rayllm.request import Request

HOLD_S = 120.0
"""How long a request goes on without a client, and how long one that has ended is kept."""
MAX_BYTES = 256 * 2**20
MAX_HISTORY_BYTES = 32 * 2**20
"""A longer answer ends with its ingress: it would fill the connection over which it is sent again, in one frame
(`link.MAX_CLIENT_FRAME_BYTES`, `link.MAX_BUFFERED_BYTES`), and that connection is many requests'."""
_LOOK_S = 1.0
_LINE_BYTES = 200
_LOGPROBS_BYTES = 200
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(list[TokenDelta])


@dataclass(slots=True)
class _Line:
    choice: int
    token_ids: array[int]
    logprobs: list[TokenLogprobs] | None
    finish: Finish | None
    prompt_logprobs: list[TokenLogprobs] | None
    num_cached_tokens: int


class History:
    """Deltas of one request in the order in which they were sent on, neighbours of one choice joined.

    A delta that ends a choice without a token stays by itself: read token by token (`messages.single_tokens`), a
    history gives what the deltas themselves would have given. One of more than `MAX_HISTORY_BYTES` is empty from then
    on, and says so."""

    def __init__(self, deltas: Iterable[TokenDelta] = ()):
        self._lines: list[_Line] = []
        self.num_bytes = 0
        self.is_too_long = False
        """To be sent again, to a driver or to who adopts it."""
        for delta in deltas:
            self.append(delta.stream, delta)

    def append(self, choice: int, delta: TokenDelta) -> None:
        if self.is_too_long:
            return
        logprobs = delta.logprobs
        last = self._lines[-1] if self._lines else None
        if last is not None and last.choice == choice and last.finish is None and _continues(delta):
            last.token_ids.frombytes(delta.token_ids)
            if last.logprobs is not None:
                last.logprobs += logprobs or ()
            last.finish = delta.finish
        else:
            ids = array("i")
            ids.frombytes(delta.token_ids)
            kept = None if logprobs is None else list(logprobs)
            line = _Line(choice, ids, kept, delta.finish, delta.prompt_logprobs, delta.num_cached_tokens)
            self._lines.append(line)
            self.num_bytes += _LINE_BYTES + _logprobs_bytes(delta.prompt_logprobs)
        self.num_bytes += len(delta.token_ids) + _logprobs_bytes(logprobs)
        if self.num_bytes > MAX_HISTORY_BYTES:
            self.is_too_long, self._lines, self.num_bytes = True, [], 0

    def deltas(self, first_stream: int = 0) -> list[TokenDelta]:
        """All of it, choice i as the stream `first_stream + i`."""
        return [
            TokenDelta(
                first_stream + line.choice,
                line.token_ids.tobytes(),
                line.finish,
                line.logprobs,
                line.prompt_logprobs,
                line.num_cached_tokens,
            )
            for line in self._lines
        ]

    def unfinished(self, num_choices: int) -> list[int]:
        """The choices that have no end in it."""
        ended = {line.choice for line in self._lines if line.finish is not None}
        return [choice for choice in range(num_choices) if choice not in ended]

    def encode(self) -> bytes:
        return _ENCODER.encode(self.deltas())

    @classmethod
    def decode(cls, encoded: bytes) -> History:
        return cls(_DECODER.decode(encoded) if encoded else ())


def _logprobs_bytes(entries: list[TokenLogprobs] | None) -> int:
    return sum(_LOGPROBS_BYTES + len(entry.ids) + len(entry.values) for entry in entries or ())


def _continues(delta: TokenDelta) -> bool:
    return bool(delta.token_ids) and delta.prompt_logprobs is None


@dataclass(slots=True, eq=False)
class Kept:
    """One request that is kept."""

    request: Request
    """As another client may submit it again, should the driver die too."""
    history: History
    open_id: str
    """The loop's name for it."""
    alone_since: float | None = None
    """Since when it has no client, or nothing more to come; None while it is served."""

    @property
    def is_free(self) -> bool:
        """Whether no client is served that reads it."""
        keep = self.request.keep
        return self.alone_since is not None or (keep is not None and keep.in_background)

    @property
    def num_bytes(self) -> int:
        keep = self.request.keep
        return self.history.num_bytes + len(self.request.prompt) + (len(keep.recipe) if keep is not None else 0)


@dataclass
class Mirror:
    """All that one driver keeps. Beyond `max_bytes` the oldest are let go, those first that nobody waits for.

    `on_let_go` is called with each that could be adopted until now."""

    on_let_go: Callable[[Kept], None] = lambda kept: None
    hold_s: float = HOLD_S
    max_bytes: int = MAX_BYTES
    _kept: dict[tuple[str, str], Kept] = field(default_factory=dict)
    _next_look_s: float = 0.0

    def add(self, request: Request, open_id: str) -> Kept:
        """Keeps it from now on, in the place of one with the same name."""
        keep = request.keep
        assert keep is not None
        history = History.decode(keep.history)
        bare = msgspec.structs.replace(request, emitted=(), keep=msgspec.structs.replace(keep, history=b""))
        kept = Kept(bare, history, open_id)
        self.forget(request.client_key, keep.answer_id)
        self._kept[request.client_key, keep.answer_id] = kept
        self._trim()
        return kept

    def find(self, client_key: str, answer_id: str) -> Kept | None:
        kept = self._kept.get((client_key, answer_id))
        return kept if kept is not None and not kept.history.is_too_long else None

    def forget(self, client_key: str, answer_id: str) -> None:
        if (client_key, answer_id) in self._kept:
            self._let_go((client_key, answer_id))

    def _let_go(self, name: tuple[str, str]) -> Kept:
        kept = self._kept.pop(name)
        self.on_let_go(kept)
        return kept

    def holds(self, kept: Kept) -> bool:
        """Whether it could be adopted."""
        return kept in self._kept.values() and not kept.history.is_too_long

    def expire(self, now: float) -> None:
        """Lets go of what was alone for too long; looks once a second."""
        if now < self._next_look_s or not self._kept:
            return
        self._next_look_s = now + _LOOK_S
        gone = [
            name
            for name, kept in self._kept.items()
            if kept.alone_since is not None and now - kept.alone_since >= self.hold_s
        ]
        for name in gone:
            self._let_go(name)

    def _trim(self) -> None:
        num_bytes = sum(kept.num_bytes for kept in self._kept.values())
        if num_bytes <= self.max_bytes:
            return
        for name, _ in sorted(self._kept.items(), key=lambda item: item[1].alone_since is None):
            num_bytes -= self._let_go(name).num_bytes
            if num_bytes <= self.max_bytes:
                return
