"""What was sent of a request so far, in a form that can be sent again: to the next driver, or to another client."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from rayllm.messages import Finish, TokenDelta, TokenLogprobs

MAX_HISTORY_BYTES = 32 * 2**20
"""A longer response is not retained: it would fill the connection over which it is sent again, in one frame
(`link.MAX_CLIENT_FRAME_BYTES`, `link.MAX_BUFFERED_BYTES`), and that connection is many requests'."""
_ENTRY_BYTES = 200
_LOGPROBS_BYTES = 200
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(list[TokenDelta])


@dataclass(slots=True)
class _Entry:
    choice: int
    token_ids: array[int]
    logprobs: list[TokenLogprobs] | None
    finish: Finish | None
    prompt_logprobs: list[TokenLogprobs] | None
    num_cached_tokens: int


class DeltaHistory:
    """The deltas of one request in the order in which they were sent, adjacent ones of a choice merged.

    A delta that ends a choice without a token stays by itself: read token by token (`messages.single_tokens`), a
    history gives what the deltas themselves would have given. One of more than `MAX_HISTORY_BYTES` is empty from then
    on, and says so."""

    def __init__(self, deltas: Iterable[TokenDelta] = ()):
        self._entries: list[_Entry] = []
        self.num_bytes = 0
        self.is_too_long = False
        """Too long to be sent again, to a driver or to a client that adopts it; then it is empty."""
        for delta in deltas:
            self.append(delta.choice, delta)

    def append(self, choice: int, delta: TokenDelta) -> None:
        if self.is_too_long:
            return
        logprobs = delta.logprobs
        last = self._entries[-1] if self._entries else None
        if last is not None and last.choice == choice and last.finish is None and _continues(delta):
            last.token_ids.frombytes(delta.token_ids)
            if last.logprobs is not None:
                last.logprobs += logprobs or ()
            last.finish = delta.finish
        else:
            ids = array("i")
            ids.frombytes(delta.token_ids)
            copied = None if logprobs is None else list(logprobs)
            entry = _Entry(choice, ids, copied, delta.finish, delta.prompt_logprobs, delta.num_cached_tokens)
            self._entries.append(entry)
            self.num_bytes += _ENTRY_BYTES + _logprobs_bytes(delta.prompt_logprobs)
        self.num_bytes += len(delta.token_ids) + _logprobs_bytes(logprobs)
        if self.num_bytes > MAX_HISTORY_BYTES:
            self.is_too_long, self._entries, self.num_bytes = True, [], 0

    def deltas(self, first_stream: int = 0) -> list[TokenDelta]:
        """All of it, choice i as the stream `first_stream + i`."""
        return [
            TokenDelta(
                first_stream + entry.choice,
                entry.choice,
                entry.token_ids.tobytes(),
                entry.finish,
                entry.logprobs,
                entry.prompt_logprobs,
                entry.num_cached_tokens,
            )
            for entry in self._entries
        ]

    def unfinished(self, num_choices: int) -> list[int]:
        """The choices that have no end in it."""
        ended = {entry.choice for entry in self._entries if entry.finish is not None}
        return [choice for choice in range(num_choices) if choice not in ended]

    def encode(self) -> bytes:
        return _ENCODER.encode(self.deltas())

    @classmethod
    def decode(cls, encoded: bytes) -> DeltaHistory:
        return cls(_DECODER.decode(encoded) if encoded else ())


def _logprobs_bytes(entries: list[TokenLogprobs] | None) -> int:
    return sum(_LOGPROBS_BYTES + len(entry.ids) + len(entry.values) for entry in entries or ())


def _continues(delta: TokenDelta) -> bool:
    return bool(delta.token_ids) and delta.prompt_logprobs is None
