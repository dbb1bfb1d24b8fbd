"""The journal of an open request: what is needed to continue it on another driver.

A request's journal holds what was asked and what was delivered; everything else about it is recomputed from that.
When a driver is lost, each open request is submitted to the next one with the ids that were delivered, and its stream
continues where it was: no token is lost, repeated or changed.
"""

from __future__ import annotations

import logging
from array import array
from dataclasses import dataclass, field

import msgspec

from rayllm.engine.delta_history import DeltaHistory
from rayllm.errors import EngineError
from rayllm.messages import READER_PAUSED, Finish, TokenDelta
from rayllm.request import Request

log = logging.getLogger(__name__)

MAX_FAULTS = 3
_LOST_CODES = frozenset({"engine_gone", "engine_error", "worker_died", READER_PAUSED})
"""Codes of `Finish` by which a driver says that it is lost itself, or has paused a request, not that it refuses it."""


@dataclass(slots=True)
class ChoiceRecord:
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


class Journal:
    """One request's record. `append` is called before anything is passed on."""

    def __init__(self, request: Request):
        self.request = request
        self.choices = [ChoiceRecord() for _ in range(request.params.n)]
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


def is_fault(finish: Finish | None) -> bool:
    """Whether these are a driver's last words about a request that is to be submitted again, not a refusal."""
    return finish is not None and finish.reason == "error" and finish.code in _LOST_CODES
