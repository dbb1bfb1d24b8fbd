"""What all endpoints share: a body in, an answer or a stream out, refusals in one shape, clients that go."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from rayllm.api.answer import Answer
from rayllm.api.errors import answer_for, shaped, shorten
from rayllm.api.resume import LAST_EVENT_HEADER, RESUME_HEADER, HeldStreams
from rayllm.api.service import ModelService
from rayllm.errors import RayLLMError, RequestError
from rayllm.serve.http_answers import (
    ClientGoneError,
    EventStream,
    error_response,
    json_response,
    read_object,
    unless_gone,
)

TIMEOUT_HEADER = "x-request-timeout"
_CLIENT_CLOSED_STATUS = 499
_LOG = logging.getLogger("rayllm.serve")

OpenAnswer = Callable[[dict[str, Any], ModelService, str], Awaitable[Answer]]
"""Checks a body, submits it for the client of that key, and returns its answer."""
PlainWork = Callable[[dict[str, Any], ModelService], Awaitable[Any]]
"""From a body to the JSON of its answer."""


class Endpoints:
    """Carries out the requests of one application's endpoints."""

    def __init__(self, service: ModelService, max_body_bytes: int, read_timeout_s: float):
        self.service = service
        self.held = HeldStreams()
        self.read_timeout_s = read_timeout_s
        self._max_body_bytes = max_body_bytes

    async def read(self, request: Request) -> dict[str, Any]:
        """The object of the body, with what headers say in its place."""
        fields = await read_object(request, self._max_body_bytes)
        _read_timeout(request, fields)
        return fields

    async def generate(self, request: Request, open_answer: OpenAnswer, *, always_streams: bool = False) -> Response:
        """An answer, streamed where the body says so; or the rest of one whose stream was lost."""
        last_event_id, client_key = request.headers.get(LAST_EVENT_HEADER), request.state.client_key
        try:
            if last_event_id is not None:
                return EventStream(self.held.resume(last_event_id, client_key), nothing, self.read_timeout_s)
            fields = await self.read(request)
            found = await open_answer(fields, self.service, client_key)
        except Exception as error:
            return self.refuse(request, error)
        streams = always_streams or fields.get("stream")
        return await (self.stream(request, found) if streams else self.whole(request, found))

    async def plain(self, request: Request, work: PlainWork) -> Response:
        """An answer that takes no generating."""
        try:
            return json_response(await work(await read_object(request, self._max_body_bytes), self.service))
        except Exception as error:
            return self.refuse(request, error)

    async def whole(self, request: Request, found: Answer) -> Response:
        """Waits for all of an answer. Aborts it when the client goes."""
        try:
            return json_response(await unless_gone(request.receive, found.whole()))
        except Exception as error:
            return self.refuse(request, error)
        finally:
            found.close()

    async def stream(self, request: Request, found: Answer) -> Response:
        """Waits for the beginning of an answer. Aborts it when the client goes, unless it asked to come back."""
        handed_on = False
        try:
            await unless_gone(request.receive, found.start())
            handed_on = True
        except Exception as error:
            return self.refuse(request, error)
        finally:
            if not handed_on:
                found.close()
        comes_back = request.headers.get(RESUME_HEADER, "").lower() == "true"
        if not comes_back or found.media_type != Answer.media_type:
            return EventStream(found.stream(), found.close, self.read_timeout_s, found.media_type)
        held = self.held.hold(found.id, request.state.client_key, found.stream(), found.close)
        return EventStream(held.read(), nothing, self.read_timeout_s)

    def refuse(self, request: Request, error: Exception) -> Response:
        """The answer for what went wrong, counted."""
        if isinstance(error, ClientGoneError):
            return Response(status_code=_CLIENT_CLOSED_STATUS)
        if not isinstance(error, RayLLMError):
            _LOG.error("a request failed", exc_info=error)
        refused = answer_for(error)
        if self.service.metrics is not None:
            self.service.metrics.request_refused(refused.code)
        body_unread = isinstance(error, RequestError) and error.code in ("body_timeout", "body_too_large")
        return error_response(shaped(refused, request.scope["path"]), close=body_unread)


def _read_timeout(request: Request, fields: dict[str, Any]) -> None:
    """The header means what the field means, and the field wins."""
    header = request.headers.get(TIMEOUT_HEADER)
    if header is not None and fields.get("timeout") is None:
        try:
            fields["timeout"] = float(header)
        except ValueError:
            raise RequestError(
                f"the header {TIMEOUT_HEADER} must be seconds, got {shorten(header)}", param="timeout"
            ) from None


def nothing() -> None:
    """A held stream outlives its connection."""
