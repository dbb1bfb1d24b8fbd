"""Bodies in: JSON objects of a bounded size, of which the large ones are few at a time and parsed beside the loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
from starlette.requests import Request
from starlette.types import Message, Receive

from rayllm.api.body import LARGE_BODY_BYTES, parse_object
from rayllm.api.offload import MAX_LARGE_AT_ONCE, large_request, offload
from rayllm.api.service import ModelService
from rayllm.errors import RequestError, shorten
from rayllm.serve.http_responses import ClientGoneError

BODY_TIMEOUT_S = 60.0
FIRST_CHUNK_TIMEOUT_S = 4.0
"""For a body of untold length to begin. HAProxy waits for the end of a chunk's first line, however long that is: what
it has of such a line it neither passes on nor refuses."""
MAX_HELD_BYTES = 64 * 2**20
"""Of all bodies that are being received or wait to be parsed, beyond the first `LARGE_BODY_BYTES` of each."""
UNREAD = ("body_timeout", "body_too_large", "bodies_too_large", "unsupported_media_type")
"""Codes of refusals after which there may be more of the body on its way."""


class BodyReader:
    """Reads the bodies of one application's requests; `max_body_bytes` is the application's own limit, the service's
    is its model's."""

    def __init__(self, service: ModelService, max_body_bytes: int):
        self._service = service
        self._max_body_bytes = max_body_bytes
        self._num_held_bytes = 0
        self._turns = asyncio.Semaphore(MAX_LARGE_AT_ONCE)

    @contextlib.asynccontextmanager
    async def opened(self, request: Request, fields: dict[str, Any] | None = None) -> AsyncIterator[dict[str, Any]]:
        """The JSON object of a body, for the block that makes an answer of it; large ones take turns. `fields`: the
        same, where it was read before. Raises `RequestError` where it is too large, too slow or no JSON."""
        if fields is not None:
            async with self._turn(getattr(request.state, "has_large_body", False)):
                yield fields
            return
        _check_content_type(request)
        with self._counted() as held:
            body = await self._read(request, held)
            if len(body) <= LARGE_BODY_BYTES:
                yield parse_object(body)
                return
            self._service.model()  # where there is none, nothing need be parsed
            request.state.has_large_body = True
            async with self._turn(True):
                fields = await offload(parse_object, body, self._service.max_values)
                del body
                yield fields

    @contextlib.asynccontextmanager
    async def _turn(self, is_large: bool) -> AsyncIterator[None]:
        if not is_large:
            yield
            return
        async with self._turns:
            with large_request():
                yield

    async def _read(self, request: Request, held: _HeldBytes) -> bytes:
        limit = min(self._max_body_bytes, self._service.max_body_bytes)
        is_chunked = "transfer-encoding" in request.headers
        try:
            with anyio.fail_after(BODY_TIMEOUT_S):
                first = await _first_chunk(request.receive) if is_chunked else await request.receive()
                return await _read_bytes(request.receive, first, limit, held)
        except TimeoutError:
            raise RequestError(
                f"the body did not arrive within {BODY_TIMEOUT_S:g} s", code="body_timeout", status=408
            ) from None

    @contextlib.contextmanager
    def _counted(self) -> Iterator[_HeldBytes]:
        held = _HeldBytes(self)
        try:
            yield held
        finally:
            self._num_held_bytes -= held.num_bytes

    def hold(self, num_bytes: int) -> None:
        """Counts bytes of a body. Raises `RequestError` (429) where all bodies together are too large."""
        if num_bytes and self._num_held_bytes + num_bytes > MAX_HELD_BYTES:
            raise RequestError(
                f"the large bodies that are being received hold {self._num_held_bytes} bytes, at most "
                f"{MAX_HELD_BYTES} may: send this one again later",
                code="bodies_too_large",
                status=429,
            )
        self._num_held_bytes += num_bytes


class _HeldBytes:
    """What one body adds to the sum."""

    def __init__(self, reader: BodyReader):
        self._reader = reader
        self.num_bytes = 0

    def grow(self, num_body_bytes: int) -> None:
        """The body has that many bytes now."""
        further = max(0, num_body_bytes - LARGE_BODY_BYTES) - self.num_bytes
        self._reader.hold(further)
        self.num_bytes += further


def too_large(num_bytes: int | None, limit: int) -> RequestError:
    """The refusal of a body of that size; None where it is not known."""
    size = f"larger than {limit} bytes" if num_bytes is None else f"{num_bytes} bytes long"
    return RequestError(
        f"the body is {size}; at most {limit} are read, more than the model's context can use",
        code="body_too_large",
        status=413,
    )


def _check_content_type(request: Request) -> None:
    """A web page may send texts and forms to any server without asking it, JSON it may not. What names no type comes
    from no form, and if from a page, with an Origin."""
    given = request.headers.get("content-type")
    if given is None:
        return
    kind = given.partition(";")[0].strip().lower()
    if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return
    raise RequestError(
        f"the content type must be application/json, got {shorten(given)}: add the header "
        "'Content-Type: application/json' (curl: -H 'Content-Type: application/json')",
        code="unsupported_media_type",
        status=415,
    )


async def _first_chunk(receive: Receive) -> Message:
    try:
        with anyio.fail_after(FIRST_CHUNK_TIMEOUT_S):
            return await receive()
    except TimeoutError:
        raise RequestError(
            f"no chunk of the body came within {FIRST_CHUNK_TIMEOUT_S:g} s of the headers: send the first at once, "
            "and no long chunk extensions",
            code="body_timeout",
        ) from None


async def _read_bytes(receive: Receive, message: Message, max_body_bytes: int, held: _HeldBytes) -> bytes:
    """The body that begins with `message`."""
    chunks, num_bytes = [], 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        chunk = message.get("body", b"")
        num_bytes += len(chunk)
        if num_bytes > max_body_bytes:
            raise too_large(None, max_body_bytes)
        held.grow(num_bytes)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)
        message = await receive()
