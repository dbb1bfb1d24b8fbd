"""An app in front of an engine that computes nothing: what is left is the cost of speaking HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rayllm.api.service import ModelService
from rayllm.config import EngineConfig
from rayllm.demo import model_path
from rayllm.engine.owner.resolve import resolve
from rayllm.messages import EngineStats, Finish, TokenDelta
from rayllm.request import Request, pack_ids
from rayllm.serve.app import create_app
from rayllm.text.tokenizer import Tokenizer


class _IdleStream:
    def __init__(self, deltas: list[TokenDelta]):
        self._deltas = iter(deltas)

    def __aiter__(self) -> AsyncIterator[list[TokenDelta]]:
        return self

    async def __anext__(self) -> list[TokenDelta]:
        delta = next(self._deltas, None)
        if delta is None:
            raise StopAsyncIteration
        return [delta]

    def abort_choice(self, choice: int) -> None:
        pass

    def close(self) -> None:
        pass


class IdleEngine:
    """Answers with the same words over and over, a token a step."""

    def __init__(self, word_ids: list[int]):
        self._word_ids = word_ids

    def submit(self, request: Request) -> _IdleStream:
        ids = (self._word_ids * (request.max_tokens // len(self._word_ids) + 1))[: request.max_tokens]
        deltas = [TokenDelta(0, 0, pack_ids([token_id])) for token_id in ids[:-1]]
        return _IdleStream([*deltas, TokenDelta(0, 0, pack_ids(ids[-1:]), Finish("length"))])

    async def adopt(self, client_key: str, answer_id: str, takes_over: bool = True) -> None:
        raise NotImplementedError

    def forget(self, client_key: str, answer_id: str) -> None:
        raise NotImplementedError

    async def stats(self) -> EngineStats:
        raise NotImplementedError


def idle_service() -> ModelService:
    """The built-in model's tokenizer and template over an idle engine."""
    config = resolve(EngineConfig(served_model_name="idle"), num_gpus=0, num_cores=1, backend="inproc")
    tokenizer = Tokenizer.from_path(str(model_path()))
    service = ModelService()
    service.set_ready(config, tokenizer, IdleEngine(tokenizer.encode("the driver plans tokens and ")))
    return service


@contextmanager
def served_by_idle_engine() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that posts a chat to the app, straight through ASGI: no sockets, no client to pay for."""
    app = create_app(idle_service())
    loop = asyncio.new_event_loop()

    async def post(body: bytes) -> None:
        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/chat/completions", "root_path": "",
            "raw_path": b"/v1/chat/completions", "query_string": b"", "scheme": "http", "server": ("test", 80),
            "client": ("127.0.0.1", 1), "asgi": {"version": "3.0"}, "state": {},
            "headers": [(b"host", b"test"), (b"content-type", b"application/json"),
                        (b"content-length", str(len(body)).encode())],
        }  # fmt: skip
        sent_body = False
        ended = asyncio.Event()
        status = 0

        async def receive() -> dict[str, Any]:
            nonlocal sent_body
            if sent_body:
                await ended.wait()
                return {"type": "http.disconnect"}
            sent_body = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body"):
                ended.set()

        await app(scope, receive, send)
        assert status == 200, status

    try:
        yield lambda fields: loop.run_until_complete(post(json.dumps(fields).encode()))
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
