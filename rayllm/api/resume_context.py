"""Answers that outlive the ingress process that makes them.

Such an answer's request asks the driver to keep its tokens, together with the body that it came from. Another ingress
opens the same body again, with the same id and time, over the tokens that are kept: its events are the same ones, with
the same numbers, because they are then made token by token.

A context variable says so to whatever opens an answer between the endpoint and the engine: every shape of answer would
have to pass it on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import msgspec
import orjson

from rayllm.engine.client.protocols import RequestStream
from rayllm.request import Retention

MAX_BODY_BYTES = 8 * 2**20
"""The answer of a larger body ends with its ingress."""


class _ResumeBody(msgspec.Struct, frozen=True, array_like=True):
    body: bytes
    created_s: int


_DECODER = msgspec.msgpack.Decoder(_ResumeBody)


@dataclass
class ResumeContext:
    """Of the answer that is being opened. `adopted`: the kept stream that it is made of again."""

    path: str
    fields: dict[str, Any]
    in_background: bool = False
    created_s: int = field(default_factory=lambda: int(time.time()))
    answer_id: str | None = None
    adopted: RequestStream | None = None

    def keep(self, answer_id: str) -> Retention | None:
        """What the driver is asked to keep; None where the body is too large for that."""
        body = orjson.dumps(self.fields)
        if len(body) > MAX_BODY_BYTES:
            return None
        resume_body = msgspec.msgpack.encode(_ResumeBody(body, self.created_s))
        return Retention(kept_name(self.path, answer_id), resume_body, self.in_background)


def kept_name(path: str, answer_id: str) -> str:
    """What an answer of that endpoint is called at the driver."""
    return f"{path}:{answer_id}"


def adopted(path: str, answer_id: str, stream: RequestStream) -> ResumeContext:
    """Of an answer that is made again from a kept request."""
    keep = stream.request.retention
    assert keep is not None
    resume_body = _DECODER.decode(keep.response_context)
    return ResumeContext(
        path, orjson.loads(resume_body.body), keep.in_background, resume_body.created_s, answer_id, stream
    )


_current: ContextVar[ResumeContext | None] = ContextVar("resume_context", default=None)


def current() -> ResumeContext | None:
    """Of the answer that is being opened; None where it ends with its ingress."""
    return _current.get()


@contextlib.contextmanager
def opened_with(resume_context: ResumeContext | None) -> Iterator[None]:
    """Answers are opened with it inside."""
    token = _current.set(resume_context)
    try:
        yield
    finally:
        _current.reset(token)
