"""What all endpoints share: a body in, an answer or a stream out, refusals in one shape, clients that go."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from rayllm.api import resume_context
from rayllm.api.answer import Answer
from rayllm.api.errors import answer_for, shaped
from rayllm.api.resume import LAST_EVENT_HEADER, RESUME_HEADER, EventName, HeldStream, HeldStreams
from rayllm.api.resume_context import ResumeContext
from rayllm.api.service import ModelService
from rayllm.errors import RayLLMError, RequestError, shorten
from rayllm.serve.body_reader import UNREAD, BodyReader
from rayllm.serve.http_responses import (
    ClientGoneError,
    EventStream,
    error_response,
    json_response,
    unless_gone,
)

TIMEOUT_HEADER = "x-request-timeout"
_CLIENT_CLOSED_STATUS = 499
_MAX_ANSWER_ID_CHARACTERS = 200
_LOG = logging.getLogger("rayllm.serve")
_T = TypeVar("_T")

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
        self._bodies = BodyReader(service, max_body_bytes)

    @contextlib.asynccontextmanager
    async def body(self, request: Request, fields: dict[str, Any] | None = None) -> AsyncIterator[dict[str, Any]]:
        """The object of the body, with what headers say in its place, for the block that opens its answer. `fields`:
        the same, where it was read before."""
        async with self._bodies.opened(request, fields) as fields:
            _read_timeout(request, fields)
            yield fields

    async def generate(
        self,
        request: Request,
        open_answer: OpenAnswer,
        *,
        always_streams: bool = False,
        fields: dict[str, Any] | None = None,
    ) -> Response:
        """An answer, streamed where the body says so; or the rest of one whose stream was lost. `fields`: the body,
        where it is read already."""
        client_key = request.state.client_key
        try:
            if LAST_EVENT_HEADER in request.headers:
                return await self._resume(request, open_answer)
            async with self.body(request, fields) as fields:
                streams = always_streams or bool(fields.get("stream"))
                with resume_context.opened_with(continuity_of(request, fields) if streams else None):
                    found = await open_answer(fields, self.service, client_key)
        except Exception as error:
            return self.refuse(request, error)
        return await (self.stream(request, found) if streams else self.whole(request, found))

    async def _resume(self, request: Request, open_answer: OpenAnswer) -> Response:
        """The rest of a stream, wherever it was begun."""
        name, client_key = EventName.parse(request.headers[LAST_EVENT_HEADER]), request.state.client_key
        path, events = request.url.path, self.held.find(name, client_key)
        if events is None:
            found = await self.adopt(
                path, name.answer_id, client_key, lambda fields: open_answer(fields, self.service, client_key)
            )
            if found is None:
                raise self.held.not_held(name)
            events = self.hold(path, found, client_key, num_seen=name.number).read(name.number)
        return EventStream(events, nothing, self.read_timeout_s)

    def hold(
        self,
        path: str,
        found: Answer,
        client_key: str,
        *,
        background: bool = False,
        num_seen: int = 0,
    ) -> HeldStream:
        """`HeldStreams.hold`, for an answer of that endpoint; when it is dropped, the engine forgets it too."""

        def dropped() -> None:
            if not found.is_adopted_by_another and (engine := self.service.engine) is not None:
                engine.forget(client_key, resume_context.kept_name(path, found.id))

        return self.held.hold(found, client_key, background=background, num_seen=num_seen, on_dropped=dropped)

    async def drop(self, path: str, answer_id: str, client_key: str) -> bool:
        """Ends an answer that is held, here or elsewhere; False where there is none."""
        if self.held.drop(answer_id, client_key):
            return True
        engine, name = self.service.model().engine, resume_context.kept_name(path, answer_id)
        stream = await engine.adopt(client_key, name)
        if stream is None:
            return False
        stream.close()
        engine.forget(client_key, name)
        return True

    async def adopt(
        self,
        path: str,
        answer_id: str,
        client_key: str,
        open_again: Callable[[dict[str, Any]], Awaitable[_T]],
        *,
        takes_over: bool = True,
    ) -> _T | None:
        """What `open_again` makes of the body of an answer of that endpoint that another process began, over the tokens
        that the engine keeps of it; None where it keeps none, or, unless it `takes_over`, another process has it."""
        if len(answer_id) > _MAX_ANSWER_ID_CHARACTERS:
            return None
        name = resume_context.kept_name(path, answer_id)
        stream = await self.service.model().engine.adopt(client_key, name, takes_over)
        if stream is None:
            return None
        try:
            continued = resume_context.adopted(path, answer_id, stream)
            with resume_context.opened_with(continued):
                return await open_again(continued.fields)
        except BaseException:
            stream.close()
            raise

    async def plain(self, request: Request, work: PlainWork, fields: dict[str, Any] | None = None) -> Response:
        """An answer that takes no generating. `fields`: the body, where it is read already."""
        try:
            async with self.body(request, fields) as fields:
                return json_response(await work(fields, self.service))
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
        if not _comes_back(request) or found.media_type != Answer.media_type:
            return EventStream(found.stream(), found.close, self.read_timeout_s, found.media_type)
        held = self.hold(request.url.path, found, request.state.client_key)
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
        body_unread = isinstance(error, RequestError) and error.code in UNREAD
        return error_response(shaped(refused, request.scope["path"]), close=body_unread)


def continuity_of(request: Request, fields: dict[str, Any]) -> ResumeContext | None:
    """Of an answer that its client says it comes back to."""
    return ResumeContext(request.url.path, fields) if _comes_back(request) else None


def _comes_back(request: Request) -> bool:
    return request.headers.get(RESUME_HEADER, "").lower() == "true"


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
