"""The outermost layer: what no request gets past, whatever its path. Plain ASGI, so that streams flow through.

Request ids, an API key on all paths but a few, bounds on headers, and an envelope for what nothing else caught.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayllm.api.errors import ErrorAnswer, answer, answer_for, shaped
from rayllm.observability.request_context import RequestContext, current_request
from rayllm.observability.trace import RequestSpan, Tracer
from rayllm.serve.body_reader import too_large
from rayllm.serve.browser_guard import BrowserGuard
from rayllm.serve.http_responses import error_response
from rayllm.serve.routes.pages import PAGE_PATHS

_QUIET_PATHS = frozenset({"/health", "/ready", "/ping", "/metrics", "/load", "/dashboard/state"})
OPEN_PATHS = frozenset({"/health", "/ready", "/ping"}) | PAGE_PATHS
MAX_HEADER_BYTES = 32 * 1024
_LOG = logging.getLogger("rayllm.serve.access")
_SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_CONTROL_CHARACTER = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


AnswerListener = Callable[[str, str, int], None]
"""Told of each answer: route, method, status."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})


class Guard:
    """Wraps an ASGI application. `sends_request_id=False` where what stands before it, such as Serve, sends the id.
    `browsers` says which pages may ask; keys make it needless. `max_body_bytes` is asked at each request."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Sequence[str] = (),
        max_body_bytes: Callable[[], int],
        sends_request_id: bool = True,
        on_answer: AnswerListener = lambda handler, method, status: None,
        tracer: Tracer | None = None,
        browsers: BrowserGuard | None = None,
    ):
        self._app = app
        self._browsers = None if api_keys else browsers
        self._on_answer = on_answer
        self._tracer = tracer
        self._key_digests = [_digest(key.encode()) for key in api_keys]
        self._max_body_bytes = max_body_bytes
        self._sends_request_id = sends_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        request_id = _request_id(headers)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id.decode()
        state["client_key"] = self._client_key(headers)
        started_s = time.perf_counter()
        context = RequestContext(request_id.decode(), span=self._span(scope, headers))
        token = current_request.set(context)
        status = 0

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._sends_request_id:
                    message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id)]}
            await send(message)

        try:
            refused = self._refusal(scope, headers)
            if refused is not None:
                await error_response(shaped(refused, scope["path"]), close=True)(scope, receive, send_noted)
            else:
                await self._app(scope, receive, send_noted)
        except Exception as error:
            _LOG.exception("%s %s failed", scope["method"], scope["path"])
            if not status:
                await error_response(shaped(answer_for(error), scope["path"]))(scope, receive, send_noted)
        finally:
            self._on_answer(_handler(scope), _method(scope), status or 500)
            if context.span is not None:
                _close_span(context, scope, status)
            _log_access(scope, status, time.perf_counter() - started_s, context)
            current_request.reset(token)

    def _span(self, scope: Scope, headers: list[tuple[bytes, bytes]]) -> RequestSpan | None:
        if self._tracer is None or scope["method"] != "POST":
            return None
        given = next((value for name, value in headers if name == b"traceparent"), b"")
        return self._tracer.open_request(given.decode("latin-1"))

    def _refusal(self, scope: Scope, headers: list[tuple[bytes, bytes]]) -> ErrorAnswer | None:
        if sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            return answer(431, f"the headers are longer than {MAX_HEADER_BYTES} bytes", code="headers_too_large")
        path = scope["path"]
        if not path.startswith("/") or scope.get("http_version") == "0.9":
            return answer(400, "not a request of HTTP/1", code="invalid_request_line")
        if self._browsers is not None and (refused := self._browsers.refusal(scope, headers)) is not None:
            return refused
        root = scope.get("root_path") or ""
        if self._key_digests and path.removeprefix(root) not in OPEN_PATHS and not self._has_key(headers):
            return answer(401, "missing or wrong API key: send 'Authorization: Bearer KEY'", code="invalid_api_key")
        return _bad_headers(headers) or self._too_large(headers)

    def _client_key(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Whose request it is, without telling the key: clients get fair shares by it. Empty where none is asked."""
        given = _given_keys(headers)
        return _digest(given[0]).hex()[:16] if self._key_digests and given else ""

    def _has_key(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Constant-time, on digests: neither a key's length nor its beginning shows in the time taken."""
        given = _given_keys(headers)
        if len(given) != 1:
            return False
        digest = _digest(given[0])
        matches = [hmac.compare_digest(digest, known) for known in self._key_digests]
        return any(matches)

    def _too_large(self, headers: Iterable[tuple[bytes, bytes]]) -> ErrorAnswer | None:
        limit = self._max_body_bytes()
        for name, value in headers:
            if name == b"content-length" and (not value.isdigit() or int(value[:20]) > limit):
                size = int(value[:20]) if value.isdigit() and len(value) <= 20 else None
                return answer_for(too_large(size, limit))
        return None


def _given_keys(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """The different keys of a request: `Authorization: Bearer KEY`, or Anthropic's `x-api-key: KEY`."""
    keys = []
    for name, value in headers:
        if name == b"authorization":
            keys.append(value[7:] if value[:7].lower() == b"bearer " else b"")
        elif name == b"x-api-key":
            keys.append(value)
    return list(dict.fromkeys(keys))


def _close_span(context: RequestContext, scope: Scope, status: int) -> None:
    attributes = {
        "gen_ai.request.id": context.request_id,
        "gen_ai.usage.prompt_tokens": context.num_prompt_tokens,
        "gen_ai.usage.completion_tokens": context.num_generated_tokens,
        "http.request.method": _method(scope),
        "http.route": _handler(scope),
        "http.response.status_code": status,
    }
    assert context.span is not None
    context.span.has_failed |= status >= 500
    context.span.close(attributes)


def _log_access(scope: Scope, status: int, elapsed_s: float, context: RequestContext) -> None:
    """One line a request; probes and scrapes, which come every second, only where somebody debugs."""
    level = logging.DEBUG if scope["path"] in _QUIET_PATHS else logging.INFO
    if not _LOG.isEnabledFor(level):
        return
    num_in, num_out = context.num_prompt_tokens, context.num_generated_tokens
    fields = {
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "duration_ms": round(elapsed_s * 1e3, 1),
        "prompt_tokens": num_in,
        "completion_tokens": num_out,
    }
    text = "%s %s %d %.1f ms, %d tokens in, %d out"
    arguments = scope["method"], scope["path"], status, elapsed_s * 1e3, num_in, num_out
    _LOG.log(level, text, *arguments, extra={"fields": fields, "request_id": context.request_id})


def _handler(scope: Scope) -> str:
    """The route that answered, as it was declared; `none` for what met no route: a client's path is no label."""
    return str(getattr(scope.get("route"), "path", "none"))


def _method(scope: Scope) -> str:
    method = str(scope["method"])
    return method if method in _METHODS else "other"


def _bad_headers(headers: Sequence[tuple[bytes, bytes]]) -> ErrorAnswer | None:
    if sum(name == b"host" for name, _ in headers) > 1:
        return answer(400, "more than one Host header", code="invalid_header")
    for name, value in headers:
        if _CONTROL_CHARACTER.search(value):
            return answer(400, f"a control character in the header {name.decode('latin-1')!r}", code="invalid_header")
        if name == b"content-encoding" and value.lower() not in (b"", b"identity"):
            return answer(415, "compressed bodies are not read: send the body as it is", code="unsupported_encoding")
        if name == b"transfer-encoding" and value.lower() != b"chunked":
            return answer(400, "Transfer-Encoding can only be chunked", code="invalid_header")
    return None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The client's own where it is a plain word, else a new one."""
    given = next((value for name, value in headers if name == b"x-request-id"), b"")
    return given if _SANE_ID.fullmatch(given) else f"req-{secrets.token_hex(16)}".encode()
