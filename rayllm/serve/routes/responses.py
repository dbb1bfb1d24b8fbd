"""OpenAI's routes of responses: made, followed, fetched again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from rayllm.api import resume_context
from rayllm.api.openai import responses, stored_responses
from rayllm.api.openai.response_store import ResponseStore, StoredResponse
from rayllm.api.openai.responses import OpenedResponse
from rayllm.api.resume import HOLD_S, LAST_EVENT_HEADER, RESUME_HEADER, EventName, HeldStream
from rayllm.api.resume_context import ResumeContext
from rayllm.errors import RequestError
from rayllm.serve.http_responses import EventStream, json_response
from rayllm.serve.routes.endpoints import Endpoints, continuity_of, nothing

_PATH = "/v1/responses"
_MADE_AGAIN_S = 2.0


def add_routes(app: FastAPI, endpoints: Endpoints) -> None:
    served = _Responses(endpoints)
    app.state.responses = served.store

    @app.post(_PATH)
    async def create_response(request: Request) -> Response:
        return await served.create(request)

    @app.get(_PATH + "/{response_id}")
    async def response(request: Request, response_id: str) -> Response:
        if request.query_params.get("stream", "false").lower() == "true":
            return await served.follow(request, response_id)
        return await served.found(request, response_id, lambda key: served.store.get(key, response_id).response)

    @app.delete(_PATH + "/{response_id}")
    async def delete_response(request: Request, response_id: str) -> Response:
        return await served.found(
            request, response_id, lambda key: stored_responses.deleted(served.store, key, response_id)
        )

    @app.post(_PATH + "/{response_id}/cancel")
    async def cancel_response(request: Request, response_id: str) -> Response:
        return await served.found(
            request, response_id, lambda key: stored_responses.cancelled(served.store, key, response_id)
        )

    @app.get(_PATH + "/{response_id}/input_items")
    async def response_input_items(request: Request, response_id: str) -> Response:
        def page(client_key: str) -> Any:
            return stored_responses.input_items(served.store, client_key, response_id, request.query_params)

        return await served.found(request, response_id, page)


class _Responses:
    """The responses of one application: those that it stores, and those of others that the engine keeps."""

    def __init__(self, endpoints: Endpoints):
        self._endpoints = endpoints
        self.store = ResponseStore(self._on_dropped)

    async def create(self, request: Request) -> Response:
        endpoints, client_key = self._endpoints, request.state.client_key
        try:
            if LAST_EVENT_HEADER in request.headers:
                name = EventName.parse(request.headers[LAST_EVENT_HEADER])
                return EventStream(await self._events(name, client_key), nothing, endpoints.read_timeout_s)
            async with endpoints.body(request) as fields:
                previous = fields.get("previous_response_id")
                if isinstance(previous, str) and await self._bring(client_key, previous):
                    await self._ended(client_key, previous)
                streams, background = bool(fields.get("stream")), fields.get("background") is True
                if background:
                    outlives: ResumeContext | None = ResumeContext(_PATH, fields, in_background=True)
                else:
                    outlives = continuity_of(request, fields) if streams else None
                with resume_context.opened_with(outlives):
                    opened = await responses.open_response(fields, endpoints.service, self.store, client_key)
        except Exception as error:
            return endpoints.refuse(request, error)
        if not opened.background:
            return await (endpoints.stream if streams else endpoints.whole)(request, opened.answer)
        held = self._hold(opened, client_key)
        if streams:
            return EventStream(held.read(), nothing, endpoints.read_timeout_s)
        return json_response(opened.answer.response)

    async def follow(self, request: Request, response_id: str) -> Response:
        """The events of a response, those already seen left out."""
        client_key = request.state.client_key
        try:
            name = EventName(response_id, stored_responses.starting_after(request.query_params))
            if not self.store.has(client_key, response_id):
                await self._adopt(client_key, name)
            self.store.get(client_key, response_id)
            events = await self._events(name, client_key)
        except Exception as error:
            return self._endpoints.refuse(request, error)
        return EventStream(events, nothing, self._endpoints.read_timeout_s)

    async def found(self, request: Request, response_id: str, work: Callable[[str], Any]) -> Response:
        """The answer of `work`, which is given whose request it is."""
        client_key = request.state.client_key
        try:
            await self._bring(client_key, response_id)
            return json_response(work(client_key))
        except Exception as error:
            return self._endpoints.refuse(request, error)

    async def _events(self, name: EventName, client_key: str) -> AsyncIterator[bytes]:
        events = self._endpoints.held.find(name, client_key)
        if events is None and await self._adopt(client_key, name):
            events = self._endpoints.held.find(name, client_key)
        if events is None:
            raise RequestError(
                f"no events of {name.answer_id[:100]!r} are held from there on: they are of responses with "
                f"background=true, and for {HOLD_S:g} s of streams begun with {RESUME_HEADER}: true; fetch the "
                "response without stream",
                param="starting_after",
                code="resume_not_found",
                status=404,
            )
        return events

    async def _bring(self, client_key: str, response_id: str) -> bool:
        """Has the response here, where the engine keeps what another process made of it that nobody reads; whether it
        was brought."""
        if self.store.has(client_key, response_id):
            return False
        return await self._adopt(client_key, EventName(response_id, 0), takes_over=False)

    async def _ended(self, client_key: str, response_id: str) -> None:
        """Waits a moment for a response that is made again: one that had ended soon has again."""
        with anyio.move_on_after(_MADE_AGAIN_S):
            while not self.store.get(client_key, response_id).ended:
                await asyncio.sleep(0.005)

    async def _adopt(self, client_key: str, name: EventName, *, takes_over: bool = True) -> bool:
        def open_again(fields: dict[str, Any]) -> Any:
            return responses.open_response(fields, self._endpoints.service, self.store, client_key)

        opened: OpenedResponse | None = await self._endpoints.adopt(
            _PATH, name.answer_id, client_key, open_again, takes_over=takes_over
        )
        if opened is not None:
            self._hold(opened, client_key, name.number)
        return opened is not None

    def _hold(self, opened: OpenedResponse, client_key: str, num_seen: int = 0) -> HeldStream:
        found, stored, background = opened.answer, opened.stored, opened.background
        num_skipped = 0 if background else num_seen
        held = self._endpoints.hold(_PATH, found, client_key, background=background, num_seen=num_skipped)
        if stored is not None and background:
            stored.num_event_bytes = lambda: held.num_bytes
            stored.cancel = lambda: held.end(found.cancel())
        return held

    def _on_dropped(self, stored: StoredResponse) -> None:
        client_key, response_id = stored.key
        self._endpoints.held.drop(response_id, client_key)
