"""The Serve deployment that speaks HTTP: the FastAPI app of `serve.app` over a connection to the driver.

It is up before the engine is, answers `/health` with the engine's stage, and finds the next driver when one is lost.
Requests and tokens go over the connection's own socket, never through Serve's handles.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from rayllm.api import offload
from rayllm.api.service import READY, ModelService
from rayllm.config import EngineConfig, ResolvedConfig, ServerConfig
from rayllm.engine.client.driver_connection import DriverConnection
from rayllm.engine.client.journaled_client import JournaledClient
from rayllm.engine.client.named_connection import connect_by_name
from rayllm.engine.discovery import find_driver
from rayllm.engine.driver.fault_injection import kill_worker
from rayllm.engine.owner.stage_board import published_stage
from rayllm.errors import EngineError, EngineUnreachableError
from rayllm.executor.ray_connection import is_own_ray, ray_watch
from rayllm.executor.ray_watch import RayWatch
from rayllm.observability.logs import setup_logging
from rayllm.observability.trace import open_tracer
from rayllm.serve.serve_private import prepare_replica_sockets
from rayllm.structured.trial import GrammarTrials
from rayllm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from fastapi import FastAPI

    from rayllm.executor.worker_process import WorkerPlace
    from rayllm.serve.routes.pages import Deployment

_CALL_TIMEOUT_S = 5.0
_STAGE_TIMEOUT_S = 1.0
_REPORT_PERIOD_S = 1.0


class Ingress:
    """What Serve makes a replica of; `asgi_builder` gives it its HTTP side.

    `engine` is the engine deployment's handle: bound so that Serve deploys both together, and not used.
    """

    def __init__(self, engine: Any):
        prepare_replica_sockets()
        self._engine = engine

    async def drain(self, end: bool = False) -> tuple[int, int]:
        """Refuses new requests from now on; with `end`, the open ones end with an error. Returns this replica's
        process id and how many requests are open."""
        state = self.app.state  # type: ignore[attr-defined]  # Serve adds `app`
        if end:
            state.connection.cancel()
        return os.getpid(), state.service.drain()

    def place(self) -> WorkerPlace:
        """Where this replica runs."""
        from rayllm.executor.worker_process import worker_place

        return worker_place()


def asgi_builder(engine: EngineConfig, server: ServerConfig) -> Callable[[], FastAPI]:
    """A function for `serve.ingress`: makes the app inside each replica."""

    def build() -> FastAPI:
        return build_http_app(engine, server)

    return build


def build_http_app(engine: EngineConfig, server: ServerConfig) -> FastAPI:
    """The app, and a task for as long as it lives that keeps it connected to its engine.

    Raises `ConfigError` for a tokenizer, template or key file that cannot be used.
    """
    from rayllm.serve.app import create_app
    from rayllm.serve.engine_replica import resolve_on_cluster

    setup_logging(engine.log_format, process="ingress", file=engine.log_file)
    resolved = resolve_on_cluster(engine)
    if described := resolved.generation.described():
        log.info("sampling defaults of requests: %s", described)
    tokenizer = Tokenizer.from_config(resolved)
    is_alone = server.num_ingress_replicas == 1
    grammars = None
    if not tokenizer.is_missing:
        grammars = GrammarTrials(resolved.tokenizer_path, resolved.shape.vocab_size, resolved.shape.eos_token_ids)
    name = "" if is_alone else f"{socket.gethostname()}:{os.getpid()}"
    service = ModelService("starting the engine", name, grammars)
    tracer = open_tracer(engine.otlp_traces_endpoint, "ingress")
    describe = functools.partial(describe_deployment, engine.name)
    app = create_app(
        service,
        api_keys=server.read_api_keys(),
        read_timeout_s=server.read_timeout_s,
        describe=describe,
        kill_worker=functools.partial(kill_worker, engine.name) if server.enable_fault_injection else None,
        tracer=tracer,
        sends_request_id=False,  # Serve does
        allowed_origins=server.allowed_origins,
        allowed_hosts=(*server.allowed_hosts, server.host),
    )

    @contextlib.asynccontextmanager
    async def connected(app: FastAPI) -> AsyncIterator[None]:
        task = app.state.connection = asyncio.create_task(
            keep_connected(service, tokenizer, engine.name, resolved, engine.driver_wait_s, reports=not is_alone)
        )
        if grammars is not None:
            grammars.warm_up()
        offload.share_interpreter()
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            app.state.held.close()  # after the connection: what the driver keeps goes on, for another ingress
            app.state.markup.close()
            if grammars is not None:
                grammars.close()

    app.state.service = service
    app.router.lifespan_context = connected
    return app


async def keep_connected(
    service: ModelService,
    tokenizer: Tokenizer,
    engine_name: str,
    expected: ResolvedConfig,
    driver_wait_s: float = 60.0,
    reports: bool = False,
) -> None:
    """Makes `service` ready when there is a driver of that name with the model that is `expected`, not ready when it
    is lost, and so on for ever. In a rolling update the previous model's driver may still be there.
    With `reports`, its metrics are left with the driver, for other ingresses.
    Open requests go on with the next driver; when this is cancelled, they end. So they do when the Ray of our own dies
    in which this runs; then this returns."""
    engine = JournaledClient(driver_wait_s, on_replay=service.note_replay)
    ray = ray_watch() if is_own_ray() else RayWatch([])  # in a cluster, other nodes' engines may go on without ours
    ended = EngineError("the server stops", code="shutting_down")
    waiting_for = "starting the engine"
    config: ResolvedConfig | None = None

    async def connect() -> DriverConnection:
        nonlocal config
        found, connection = await _connect(engine_name)
        if (found.model_path, found.tokenizer_path) != (expected.model_path, expected.tokenizer_path):
            connection.close()
            raise EngineUnreachableError(
                f"engine {engine_name!r} serves a different model, of the previous or the next version"
            )
        config = found
        return connection

    async def on_unreachable(error: Exception) -> None:
        stage = await _stage(engine_name) or waiting_for
        reason = "" if stage in str(error) else str(error)  # which says that it is at this stage
        service.set_stage("connecting to the engine" if stage == READY else stage, reason)

    def on_attached() -> None:
        assert config is not None
        service.set_ready(config, tokenizer, engine)

    def on_lost(reason: str) -> None:
        nonlocal waiting_for
        waiting_for = "restarting the engine"
        service.note_driver_lost()
        service.set_stage(waiting_for, reason)

    reporting = asyncio.create_task(_report(service, engine)) if reports else None
    try:
        await ray.until_lost(engine.keep_attached(connect, on_unreachable, on_attached, on_lost))
    except EngineError as error:
        ended = error
        service.set_stage("Ray died", str(error))
    finally:
        if reporting is not None:
            reporting.cancel()
        engine.end(ended)


async def _report(service: ModelService, engine: JournaledClient) -> None:
    """Leaves this ingress's metrics with the driver, for the others, which may be asked for them."""
    while True:
        if service.metrics is not None:
            engine.report(service.metrics.report())
        await asyncio.sleep(_REPORT_PERIOD_S)


async def _connect(engine_name: str) -> tuple[ResolvedConfig, DriverConnection]:
    import ray

    try:
        driver = find_driver(engine_name)
    except EngineUnreachableError as error:  # its owner may know why there is none
        stage = await asyncio.to_thread(published_stage, engine_name)
        raise EngineUnreachableError(stage or str(error)) from None
    connection = await connect_by_name(engine_name, name="ingress")
    try:
        description = await asyncio.wait_for(driver.describe.remote(), _CALL_TIMEOUT_S)
        return ResolvedConfig.model_validate_json(description.config), connection
    except ray.exceptions.RayError as error:
        connection.close()
        raise EngineUnreachableError(f"engine {engine_name!r} did not describe itself: {error}") from None
    except BaseException:
        connection.close()
        raise


async def describe_deployment(engine_name: str) -> Deployment:
    """Where this process, the driver and its workers run. Raises `EngineUnreachableError`."""
    import ray

    from rayllm.executor.worker_process import worker_place
    from rayllm.serve.routes.pages import Deployment

    try:
        return Deployment(worker_place(), await find_driver(engine_name).describe.remote())
    except ray.exceptions.RayError as error:
        raise EngineUnreachableError(f"engine {engine_name!r} did not describe itself: {error}") from None


async def _stage(engine_name: str) -> str | None:
    """What the driver is doing, or its owner where there is none; None where nobody says."""
    import ray

    try:
        return str(await asyncio.wait_for(find_driver(engine_name).stage.remote(), _STAGE_TIMEOUT_S))
    except (EngineUnreachableError, ray.exceptions.RayError, asyncio.TimeoutError):
        return await asyncio.to_thread(published_stage, engine_name) or None
