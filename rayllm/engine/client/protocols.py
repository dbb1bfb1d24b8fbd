"""What callers need of an engine: `EngineClient` for asyncio programs, `BlockingEngineClient` for a blocking thread."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from rayllm.executor.executor import Selectable
from rayllm.messages import EngineStats, TokenDelta
from rayllm.request import Request


class RequestStream(Protocol):
    """The deltas of one request.

    Ends after every choice had its `Finish`. Raises `EngineError` when the driver is gone.
    """

    def __aiter__(self) -> AsyncIterator[list[TokenDelta]]: ...

    @property
    def request(self) -> Request: ...

    def abort_choice(self, choice: int) -> None:
        """Ends one choice early; deltas of it that are under way may still come."""

    def close(self) -> None:
        """Aborts what is unfinished. May be called again; must be called in `finally`."""


class EngineClient(Protocol):
    """An engine for an asyncio program: `JournaledClient` whatever driver it has, `DriverConnection` one driver."""

    def submit(self, request: Request) -> RequestStream:
        """Raises `OverloadedError` or `EngineError` where it is refused at once; the stream may say so
        too."""

    async def adopt(self, client_key: str, answer_id: str, takes_over: bool = True) -> RequestStream | None:
        """The stream of a request that the engine retains for that client (`Request.retention`), which is this
        process's from now on; None where it keeps none of that name, or, unless it `takes_over`, serves it to another
        process."""

    def forget(self, client_key: str, answer_id: str) -> None:
        """Nobody will adopt that request any more."""

    async def stats(self) -> EngineStats: ...


class BlockingEngineClient(Protocol):
    """An engine for one thread: `BlockingJournaledClient` whatever driver it has, `BlockingDriverConnection` one
    driver, `LocalEngine` in this process. The caller numbers its streams, choice i of a request is `stream + i`."""

    def submit(self, stream: int, request: Request) -> None: ...

    def abort(self, stream: int) -> None: ...

    def receive(self, wake: Selectable | None = None) -> list[TokenDelta]:
        """The next deltas; waits for some. With `wake`, it may also return none, and does when that is readable.
        Raises `EngineError` when the engine is lost."""

    def stats(self) -> EngineStats: ...

    def reset_prefix_cache(self) -> None:
        """Nothing computed before is used for requests that come after."""

    def close(self) -> None: ...
