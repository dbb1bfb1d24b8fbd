"""Answers out: JSON, event streams, and noticing at once that a client is gone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rayllm.api.errors import ErrorAnswer

_LOG = logging.getLogger("rayllm.serve")
READ_TIMEOUT_S = 60.0
_T = TypeVar("_T")


class ClientGoneError(Exception):
    """The client closed its connection: there is nobody to answer."""


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


def error_response(error: ErrorAnswer, *, close: bool = False) -> Response:
    """`close`: the body was not read, so the connection cannot be used again."""
    headers = {**error.headers, "connection": "close"} if close else error.headers
    if error.status == 401:
        headers = {**headers, "www-authenticate": "Bearer"}
    return json_response(error.body, error.status, headers)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`. Where the client goes first, `work` is cancelled and `ClientGoneError` raised.

    The body must have been read. `receive` is not used any more once this returns.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if watch.done():  # also where both are: the message that says it comes once
            raise ClientGoneError
        return task.result()
    finally:
        await _cancel(task, watch)


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """A response of server-sent events, each piece sent as it comes.

    `close` is called when the stream ends, however it ends; a client that goes ends it at once, also while no event
    comes. One that does not read for `read_timeout_s` is taken for gone: meanwhile no further event is made for it.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        close: Callable[[], None],
        read_timeout_s: float = READ_TIMEOUT_S,
        media_type: str = "text/event-stream",
    ):
        self.status_code = 200
        self.media_type = media_type
        self._read_timeout_s = read_timeout_s
        self.background = None
        self._events = events
        self._close = close
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send_all(send))
        except TimeoutError:
            _LOG.warning("a client did not read for %g s: its stream is closed", self._read_timeout_s)
        except (ClientGoneError, OSError):
            pass
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        watch = _SendWatch(self._read_timeout_s)
        try:
            async for piece in self._events:
                watch.began_s = time.monotonic()
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                watch.began_s = None
        except asyncio.CancelledError:
            if watch.is_late:
                raise TimeoutError from None
            raise
        finally:
            watch.end()
            if isinstance(self._events, AsyncGenerator):
                await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _SendWatch:
    """Cancels the task that makes it when a send lasts too long. One timer for all sends of a stream: a timeout for
    each would cost more than the send."""

    def __init__(self, timeout_s: float):
        self.began_s: float | None = None
        """When the send under way began."""
        self.is_late = False
        self._timeout_s = timeout_s
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(timeout_s, self._look)

    def end(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        left_s = self._timeout_s
        if self.began_s is not None:
            left_s -= time.monotonic() - self.began_s
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
        else:
            assert self._task is not None
            self.is_late = True
            self._task.cancel()
