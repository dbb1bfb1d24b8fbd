"""What the API needs of an engine: one call to submit, one to ask for figures."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from rayllm.messages import EngineStats, TokenDelta
from rayllm.request import Request


class RequestStream(Protocol):
    """The deltas of one request.

    Ends after every choice had its `Finish`. Raises `EngineError` when the driver is gone.
    """

    def __aiter__(self) -> AsyncIterator[list[TokenDelta]]: ...

    def abort_choice(self, choice: int) -> None:
        """Ends one choice early; deltas of it that are under way may still come."""

    def close(self) -> None:
        """Aborts what is unfinished. May be called again; must be called in `finally`."""


class AdoptedStream(RequestStream, Protocol):
    """A kept request's, from its first token on."""

    @property
    def request(self) -> Request: ...


class EngineClient(Protocol):
    """A driver, seen from an ingress."""

    def submit(self, request: Request) -> RequestStream:
        """Raises `OverloadedError` or `EngineError` where it is refused at once; the stream may say so
        too."""

    async def adopt(self, client_key: str, answer_id: str, takes_over: bool = True) -> AdoptedStream | None:
        """The stream of a request that the engine retains for that client (`Request.retention`), which is this
        process's from now on; None where it keeps none of that name, or, unless it `takes_over`, serves it to another
        process."""

    def forget(self, client_key: str, answer_id: str) -> None:
        """Nobody will adopt that request any more."""

    async def stats(self) -> EngineStats: ...
