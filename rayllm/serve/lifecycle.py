"""Starts Ray, Serve and RayLLM's application on this machine (or in the cluster at RAY_ADDRESS), and ends them so
that nothing is left.

    with running_server(EngineConfig(model=...), ServerConfig(port=0)) as server:
        httpx.get(server.url + "/v1/models")
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial

from rayllm.config import EngineConfig, Environment, ServerConfig, count_cores
from rayllm.executor.ray_cluster import connected_ray, free_port
from rayllm.executor.ray_connection import ray_is_initialized, ray_watch
from rayllm.executor.ray_join import ray_token_in_use
from rayllm.machine.ports import check_port
from rayllm.serve.deployment import deployed
from rayllm.serve.proxy.early_port import EarlyPort
from rayllm.serve.proxy.haproxy import proxy_environment
from rayllm.serve.running_server import RunningServer, StageListener, server_url


@contextlib.contextmanager
def running_server(
    engine: EngineConfig,
    server: ServerConfig,
    *,
    on_stage: StageListener = lambda stage: None,
    on_ray: Callable[[str, str], None] = lambda address, token: None,
    wait: bool = True,
    timeout_s: float | None = None,
) -> Iterator[RunningServer]:
    """A server for the length of the block. It joins the Ray that this process is connected to, or the one at
    RAY_ADDRESS, or starts one of its own, which ends with the block together with every process of it. In a Ray that it
    joins, only what it started ends, and another's engine is a `ConfigError`: Serve has one address.

    `on_stage` hears what is being done, `on_ray` the address of the Ray that runs it and that Ray's token. `wait=False`
    yields as soon as the application is deployed.
    """
    server = server.model_copy(update={"port": server.port or free_port(server.host)})
    server.read_api_keys()
    joins = ray_is_initialized() or Environment.ray_address() is not None
    if not joins:
        check_port(server.host, server.port)
    early = None if joins else EarlyPort.open(server.host, server.port)

    def set_stage(stage: str) -> None:
        if early is not None:
            early.stage = stage
        on_stage(stage)

    set_stage("connecting to Ray" if joins else "starting Ray")
    try:
        with _ray(engine, server) as owns_ray:
            running = RunningServer(engine, server, server_url(server), owns_ray, ray_watch())
            on_ray(running.ray_address, ray_token_in_use())
            with deployed(running, set_stage):
                if early is not None:
                    running.wait_ingress()
                    early.hand_over()
                if wait:
                    running.wait_ready(on_stage, timeout_s)
                yield running
    finally:
        if early is not None:
            early.close()


@contextlib.contextmanager
def _ray(engine: EngineConfig, server: ServerConfig) -> Iterator[bool]:
    """`connected_ray`, leaving the program's own SIGTERM handler in place (Ray would replace it)."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if in_main_thread else None
    environment = partial(proxy_environment, server)
    with connected_ray(num_logical_cpus(engine, server), environment, while_connecting=_import_serve) as owns_ray:
        if in_main_thread:
            signal.signal(signal.SIGTERM, handler)
        yield owns_ray


def _import_serve() -> None:
    """What comes after Ray's start, which is mostly a wait for its processes."""
    import rayllm.serve.builder  # noqa: F401


def num_logical_cpus(engine: EngineConfig, server: ServerConfig) -> int:
    """CPUs to tell our own Ray of: the real ones, or as many as the driver, workers and ingresses are counted for."""
    return max(count_cores(), 1 + engine.layout.num_ranks + server.num_ingress_replicas)
