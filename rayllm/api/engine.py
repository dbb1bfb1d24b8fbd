"""What the API needs of an engine: one call to submit, one to ask for figures."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from rayllm.messages import EngineStats, TokenDelta
from rayllm.request import Request


class RequestStream(Protocol):
    """The deltas of one request. `TokenDelta.stream` is the choice, from 0 to n - 1.

    Ends after every choice had its `Finish`. Raises `EngineError` when the driver is gone.
    """

    def __aiter__(self) -> AsyncIterator[list[TokenDelta]]: ...

    def abort_choice(self, choice: int) -> None:
        """Ends one choice early; deltas of it that are under way may still come."""

    def close(self) -> None:
        """Aborts what is unfinished. May be called again; must be called in `finally`."""


class EngineClient(Protocol):
    """A driver, seen from an ingress."""

    def submit(self, request: Request) -> RequestStream:
        """Raises `OverloadedError` or `EngineError` where it is refused at once; the stream may say so
        too."""

    async def stats(self) -> EngineStats: ...
