"""The two pages for people, `/` and `/dashboard`, and what the dashboard asks for beside `/metrics`.

The files in `pages/` are sent as they lie there. They hold no secret and need no API key; what they ask of the API
does. Nothing on them comes from elsewhere, and their Content-Security-Policy lets nothing else in.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

import rayllm
from rayllm.api.service import ModelService
from rayllm.errors import RayLLMError
from rayllm.serve.http_responses import json_response

if TYPE_CHECKING:
    from rayllm.engine.driver.actor import EngineDescription
    from rayllm.executor.worker_process import WorkerPlace

FOLDER = Path(__file__).parents[1] / "pages"
DESCRIBE_TIMEOUT_S = 2.0
_LOG = logging.getLogger("rayllm.serve")

_CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self' data:",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
)
_HEADERS = {
    "content-security-policy": "; ".join(_POLICY),
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-cache",  # kept, and asked for each time by its ETag: a new version shows at once
}


@dataclass(frozen=True)
class Deployment:
    """What runs where."""

    ingress: WorkerPlace
    engine: EngineDescription


Describe = Callable[[], Awaitable[Deployment]]
"""Asks it. Raises `RayLLMError` where the engine cannot say it now."""


@dataclass(frozen=True)
class _File:
    body: bytes
    headers: Mapping[str, str]

    def answer(self, request: Request) -> Response:
        """The file, or only its head, or the word that the client's copy is the newest."""
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.headers["etag"] in known or "*" in known:
            return Response(status_code=304, headers={name: self.headers[name] for name in ("etag", "cache-control")})
        if request.method == "HEAD":
            return Response(headers={**self.headers, "content-length": str(len(self.body))})
        return Response(self.body, headers=self.headers)


def _read_files(folder: Path) -> dict[str, _File]:
    """The files by the path that they are served at."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in _CONTENT_TYPES:
            body = path.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
            headers = {**_HEADERS, "content-type": _CONTENT_TYPES[path.suffix], "etag": etag}
            files[f"/pages/{path.name}"] = _File(body, headers)
    return {**files, "/": files["/pages/chat.html"], "/dashboard": files["/pages/dashboard.html"]}


_FILES = _read_files(FOLDER)
PAGE_PATHS = frozenset(_FILES)
"""What is sent without an API key."""


def add_page_routes(
    app: FastAPI, service: ModelService, describe: Describe | None = None, *, can_kill_workers: bool = False
) -> None:
    """`describe` is asked anew each time: workers are replaced while the engine runs. `can_kill_workers`: the dashboard
    offers it."""

    async def page(request: Request) -> Response:
        path = request.scope["path"].removeprefix(request.scope.get("root_path") or "")
        return _FILES[path].answer(request)

    for path in _FILES:
        app.add_api_route(path, page, methods=["GET", "HEAD"], include_in_schema=False)

    @app.get("/dashboard/state", include_in_schema=False)
    async def dashboard_state() -> Response:
        found = await _deployment(describe)
        engine = None if found is None else {"num_blocks": found.engine.num_blocks}
        state = {**_service_state(service), "engine": engine, "processes": _processes(found)}
        return json_response({**state, "fault_injection": can_kill_workers})


async def _deployment(describe: Describe | None) -> Deployment | None:
    if describe is None:
        return None
    try:
        return await asyncio.wait_for(describe(), DESCRIBE_TIMEOUT_S)
    except (RayLLMError, asyncio.TimeoutError):
        return None
    except Exception:  # a page that shows states must not end with one
        _LOG.exception("the engine could not be described")
        return None


def _service_state(service: ModelService) -> dict[str, Any]:
    health = service.ready()
    state: dict[str, Any] = {
        "version": rayllm.__version__,
        "ready": health.healthy,
        "stage": health.stage,
        "reason": health.reason,
        "model": None,
    }
    if health.healthy:
        config = service.model().config
        state["model"] = {
            "name": config.served_model_name,
            "dtype": config.dtype,
            "device": config.device,
            "max_model_len": config.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "block_size": config.block_size,
            "tensor_parallel_size": config.engine.tensor_parallel_size,
        }
    return state


def _processes(found: Deployment | None) -> list[dict[str, Any]]:
    """This process, then the engine's: driver and ranks."""
    if found is None:
        alone = {"role": "ingress", "rank": None, "pid": os.getpid(), "node": "", "host": socket.gethostname()}
        return [{**alone, "devices": []}]
    return [
        _process("ingress", None, found.ingress),
        _process("driver", None, found.engine.driver),
        *(_process("worker", rank, place) for rank, place in enumerate(found.engine.workers)),
    ]


def _process(role: str, rank: int | None, place: WorkerPlace) -> dict[str, Any]:
    return {
        "role": role,
        "rank": rank,
        "pid": place.pid,
        "node": place.node_id,
        "host": place.host,
        "devices": list(place.devices) if role == "worker" else [],
    }
