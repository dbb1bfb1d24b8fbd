"""Errors as clients see them: always `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from rayllm.errors import (
    NO_TOKEN_LEFT,
    STRUCTURED_OUTPUTS_FAILED,
    ContextLengthError,
    EngineError,
    OverloadedError,
    RayLLMError,
    RequestError,
    without_paths,
)
from rayllm.messages import Finish

MAX_MESSAGE_CHARACTERS = 2000
_OBJECT_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_RETRY_AFTER_S = 1.0

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}


class NotReadyError(EngineError):
    """The model cannot answer yet (or any more); `stage` says how far it is."""

    def __init__(self, stage: str, reason: str = ""):
        super().__init__(f"the model is not ready: {stage}" + (f" ({reason})" if reason else ""), code="not_ready")
        self.stage = stage
        self.reason = reason


@dataclass(frozen=True)
class ErrorAnswer:
    """Status, body and headers of an error."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def code(self) -> str:
        """A word for metrics: ours, never a client's."""
        return str(self.body["error"]["code"] or self.body["error"]["type"])


def envelope(
    status: int, message: str, *, param: str | None = None, code: str | None = None, kind: str | None = None
) -> dict[str, Any]:
    """The body of an error. Long messages are cut and object addresses left out; of a fault of the server's own, file
    paths too."""
    if status >= 500:
        message = without_paths(message)
    message = _OBJECT_ADDRESS.sub("", message.encode("utf-8", "replace").decode())
    if len(message) > MAX_MESSAGE_CHARACTERS:
        message = f"{message[:MAX_MESSAGE_CHARACTERS]}... ({len(message)} characters)"
    kind = kind or _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer(status: int, message: str, *, param: str | None = None, code: str | None = None) -> ErrorAnswer:
    """An error with no exception behind it. 429 and 503 say when to come back."""
    return ErrorAnswer(status, envelope(status, message, param=param, code=code), _retry_headers(status))


def answer_for(error: Exception) -> ErrorAnswer:
    """What to answer for an exception. One that is not ours is a bug: a 500 that says nothing of the inside, and not a
    503, which would ask clients to send again what fails again."""
    if isinstance(error, RequestError):
        return answer(error.status, error.message, param=error.param, code=error.code)
    if isinstance(error, OverloadedError):
        body = envelope(429, str(error), code="overloaded")
        return ErrorAnswer(429, body, _retry_headers(429, error.retry_after_s))
    if isinstance(error, EngineError):
        kind = None if isinstance(error, NotReadyError) else "engine_error"
        return ErrorAnswer(503, envelope(503, str(error), code=error.code, kind=kind), _retry_headers(503))
    if isinstance(error, RayLLMError):
        return answer(503, str(error), code="engine_unreachable")
    return answer(500, "internal error; the server's log has the details", code="internal_error")


_ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {404: "not_found_error", 413: "request_too_large", 500: "api_error", 503: "api_error"}


def shaped(refused: ErrorAnswer, path: str) -> ErrorAnswer:
    """The error as clients of that path read it: Anthropic's envelope wraps ours for its own paths."""
    if path != _ANTHROPIC_PATH and not path.startswith(_ANTHROPIC_PATH + "/"):
        return refused
    return ErrorAnswer(refused.status, anthropic_envelope(refused), refused.headers)


def anthropic_envelope(refused: ErrorAnswer) -> dict[str, Any]:
    """`{"type": "error", "error": ...}`, with Anthropic's word for the error's type."""
    error = refused.body["error"]
    kind = _ANTHROPIC_TYPES.get(refused.status) or _TYPES.get(refused.status, "invalid_request_error")
    return {"type": "error", "error": {**error, "type": kind}}


def _retry_headers(status: int, retry_after_s: float = _RETRY_AFTER_S) -> dict[str, str]:
    if status not in (429, 503):
        return {}
    return {"retry-after": str(max(1, math.ceil(retry_after_s)))}


def error_of(finish: Finish) -> RayLLMError:
    """The exception that a `Finish` of reason `error` stands for."""
    message = finish.message or "the engine failed to complete the request"
    if finish.code is None:
        return RequestError(message)
    if finish.code == "context_length_exceeded":
        return ContextLengthError(message)
    if finish.code == "overloaded":
        return OverloadedError(message, retry_after_s=finish.retry_after_s or _RETRY_AFTER_S)
    if finish.code == STRUCTURED_OUTPUTS_FAILED:
        return RequestError(message, param="structured_outputs", code=finish.code)
    if finish.code == NO_TOKEN_LEFT:
        return RequestError(message, param="bad_words", code=finish.code)
    return EngineError(message, code=finish.code)
