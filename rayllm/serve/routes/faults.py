"""`POST /admin/kill_worker`: kills a worker process, for whoever wants to see the engine recover from it.

Answered with 403 unless the server runs with `--enable-fault-injection`. It asks for the API key as other routes do,
and no page of another origin may call it, whatever `--allowed-origins` says.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from rayllm.api.service import ModelService
from rayllm.errors import RequestError, did_you_mean, shorten
from rayllm.serve.routes.endpoints import Endpoints

if TYPE_CHECKING:
    from rayllm.engine.driver.fault_injection import KilledWorker

KillWorker = Callable[[int], Awaitable["KilledWorker"]]
"""Kills the worker of that rank. Raises `RayLLMError` where it cannot be killed now."""


def add_routes(app: FastAPI, endpoints: Endpoints, kill_worker: KillWorker | None) -> None:
    """`kill_worker=None`: fault injection is off."""

    async def kill(fields: dict[str, Any], service: ModelService) -> dict[str, Any]:
        assert kill_worker is not None
        killed = await kill_worker(_rank(fields, service.model().config.engine.layout.num_ranks))
        return {"object": "worker.killed", "rank": killed.rank, "pid": killed.place.pid, "host": killed.place.host}

    @app.post("/admin/kill_worker", include_in_schema=False)
    async def kill_a_worker(request: Request) -> Response:
        try:
            if kill_worker is None:
                message = "fault injection is off: start the server with --enable-fault-injection"
                raise RequestError(message, code="fault_injection_disabled", status=403)
            _check_origin(request)
        except RequestError as error:
            return endpoints.refuse(request, error)
        return await endpoints.plain(request, kill)


def _rank(fields: dict[str, Any], num_ranks: int) -> int:
    """The rank of the body; any where it names none."""
    for name in fields:
        if name != "rank":
            raise RequestError(f"unknown field {shorten(name)}{did_you_mean(name, ['rank'])}", param=name)
    rank = fields.get("rank")
    if rank is None:
        return random.randrange(num_ranks)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < num_ranks:
        allowed = f"an integer from 0 to {num_ranks - 1}" if num_ranks > 1 else "0, the only rank"
        raise RequestError(f"rank={shorten(rank)} must be {allowed}, or left out for a random one", param="rank")
    return rank


def _check_origin(request: Request) -> None:
    """`RequestError` for a page of another origin, and for what such a page could send without being asked: a body
    that is not declared as JSON."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "none")
    is_own = origin is None or urlsplit(origin).netloc == request.headers.get("host", "")
    if not is_own or site not in ("none", "same-origin"):
        message = f"pages of {shorten(origin or 'another site')} may not kill workers here: only this server's own may"
        raise RequestError(message, code="origin_not_allowed", status=403)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(
            "send the body as JSON, with the header Content-Type: application/json",
            code="unsupported_content_type",
            status=415,
        )
