"""Requests that outlive their client: a driver retains them, with all deltas sent so far, in case their ingress dies.

A request asks for this with `Request.retention`. When its client disconnects it keeps running, and another client may
adopt it, which then gets every delta from the first token on. Plain Python; time is an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from rayllm.engine.delta_history import DeltaHistory
from rayllm.request import Request

HOLD_S = 120.0
"""Seconds that a request runs without a client, and that a finished one is retained."""
MAX_BYTES = 256 * 2**20
_LOOK_S = 1.0


@dataclass(slots=True, eq=False)
class RetainedRequest:
    """A request and the deltas sent so far."""

    request: Request
    """As another client may submit it again, should the driver die too."""
    history: DeltaHistory
    open_id: str
    """The loop's name for it."""
    detached_since: float | None = None
    """When it lost its client or finished; None while a client reads it."""

    @property
    def is_free(self) -> bool:
        """Whether it may be adopted without taking it from a client that reads it."""
        retention = self.request.retention
        return self.detached_since is not None or (retention is not None and retention.in_background)

    @property
    def num_bytes(self) -> int:
        retention = self.request.retention
        context_bytes = len(retention.response_context) if retention is not None else 0
        return self.history.num_bytes + len(self.request.prompt) + context_bytes


@dataclass
class RetainedRequests:
    """The requests that one driver retains. Beyond `max_bytes` the oldest are dropped, those without a client first.

    `on_drop` is called with each dropped request."""

    on_drop: Callable[[RetainedRequest], None] = lambda retained: None
    hold_s: float = HOLD_S
    max_bytes: int = MAX_BYTES
    _by_name: dict[tuple[str, str], RetainedRequest] = field(default_factory=dict)
    _next_look_s: float = 0.0

    def add(self, request: Request, open_id: str) -> RetainedRequest:
        """Retains a request; it replaces one with the same name."""
        retention = request.retention
        assert retention is not None
        history = DeltaHistory.decode(retention.history)
        bare = msgspec.structs.replace(request, emitted=(), retention=msgspec.structs.replace(retention, history=b""))
        retained = RetainedRequest(bare, history, open_id)
        self.forget(request.client_key, retention.answer_id)
        self._by_name[request.client_key, retention.answer_id] = retained
        self._trim()
        return retained

    def find(self, client_key: str, answer_id: str) -> RetainedRequest | None:
        retained = self._by_name.get((client_key, answer_id))
        return retained if retained is not None and not retained.history.is_too_long else None

    def forget(self, client_key: str, answer_id: str) -> None:
        if (client_key, answer_id) in self._by_name:
            self._drop((client_key, answer_id))

    def _drop(self, name: tuple[str, str]) -> RetainedRequest:
        retained = self._by_name.pop(name)
        self.on_drop(retained)
        return retained

    def holds(self, retained: RetainedRequest) -> bool:
        """Whether it can still be adopted."""
        return retained in self._by_name.values() and not retained.history.is_too_long

    def expire(self, now: float) -> None:
        """Drops requests without a client for longer than `hold_s`; checks once a second."""
        if now < self._next_look_s or not self._by_name:
            return
        self._next_look_s = now + _LOOK_S
        gone = [
            name
            for name, retained in self._by_name.items()
            if retained.detached_since is not None and now - retained.detached_since >= self.hold_s
        ]
        for name in gone:
            self._drop(name)

    def _trim(self) -> None:
        num_bytes = sum(retained.num_bytes for retained in self._by_name.values())
        if num_bytes <= self.max_bytes:
            return
        for name, _ in sorted(self._by_name.items(), key=lambda item: item[1].detached_since is None):
            num_bytes -= self._drop(name).num_bytes
            if num_bytes <= self.max_bytes:
                return
