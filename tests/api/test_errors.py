from __future__ import annotations

import pytest

from rayllm.api.errors import MAX_MESSAGE_CHARACTERS, NotReadyError, answer_for, envelope, error_of
from rayllm.errors import (
    NO_TOKEN_LEFT,
    ContextLengthError,
    EngineError,
    EngineUnreachableError,
    OverloadedError,
    RequestError,
    WorkerDiedError,
    shorten,
)
from rayllm.messages import Finish


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "retry_after"),
    [
        (RequestError("m", param="n"), 400, "invalid_request_error", None, None),
        (RequestError("m", param="n", code="c", status=404), 404, "invalid_request_error", "c", None),
        (ContextLengthError("m", param="n"), 400, "invalid_request_error", "context_length_exceeded", None),
        (OverloadedError("m", retry_after_s=2.1), 429, "rate_limit_error", "overloaded", "3"),
        (EngineError("m"), 503, "engine_error", "engine_error", "1"),
        (WorkerDiedError(1, "m"), 503, "engine_error", "worker_died", "1"),
        (NotReadyError("loading"), 503, "service_unavailable", "not_ready", "1"),
        (EngineUnreachableError("m"), 503, "service_unavailable", "engine_unreachable", "1"),
        (KeyError("secret"), 500, "server_error", "internal_error", None),
    ],
)
def test_every_error_has_its_status_and_envelope(
    error: Exception, status: int, kind: str, code: str | None, retry_after: str | None
) -> None:
    answer = answer_for(error)

    assert answer.status == status
    assert set(answer.body) == {"error"}
    assert set(answer.body["error"]) == {"message", "type", "param", "code"}
    assert (answer.body["error"]["type"], answer.body["error"]["code"]) == (kind, code)
    assert answer.headers.get("retry-after") == retry_after
    assert "secret" not in answer.body["error"]["message"]


def test_a_message_is_bounded_and_shows_no_address() -> None:
    message = envelope(400, f"<function f at 0x7f00dead> {'x' * 100_000} \ud800")["error"]["message"]

    assert "0x7f" not in message
    assert len(message) < MAX_MESSAGE_CHARACTERS + 50


@pytest.mark.parametrize(
    ("finish", "kind"),
    [
        (Finish("error", code="context_length_exceeded", message="m"), ContextLengthError),
        (Finish("error", code="overloaded", message="m"), OverloadedError),
        (Finish("error", code=None, message="m"), RequestError),
        (Finish("error", code=NO_TOKEN_LEFT, message="m"), RequestError),
        (Finish("error", code="worker_died", message="m"), EngineError),
    ],
)
def test_an_engines_last_word_becomes_its_exception(finish: Finish, kind: type[Exception]) -> None:
    error = error_of(finish)

    assert type(error) is kind
    assert str(error) == "m"


def test_values_are_shown_in_short() -> None:
    assert shorten("x" * 1000) == repr("x" * 80) + "..."
    assert shorten([1] * 1000) == "a list of 1000"
    assert shorten({"a": 1}) == "{'a': 1}"
    assert len(shorten(10**4000)) < 100
