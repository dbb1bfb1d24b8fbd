"""RayLLM as a Serve application: for `serve run rayllm.serve.builder:build_app model=...`, config files and
`running_server`.

    applications:
      - name: rayllm
        import_path: rayllm.serve.builder:build_app
        args: {model: /models/qwen, tensor_parallel_size: 2}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from click import ClickException
from ray import serve
from ray.serve.exceptions import RayServeException

from rayllm.config import EngineConfig, ServerConfig, parse_settings
from rayllm.errors import ConfigError
from rayllm.executor.placement import cluster_nodes
from rayllm.executor.ray_connection import ray_is_initialized
from rayllm.serve.engine_replica import EngineReplica
from rayllm.serve.ingress import Ingress, asgi_builder

INGRESS = "Ingress"
"""The deployment that speaks HTTP."""
ENGINE = "Engine"
"""The one that owns the engine."""

_MAX_OPEN_REQUESTS = 100_000
"""Serve's default of 5 would queue in its proxy; the engine has a queue of its own and refuses by itself."""

_SHUTDOWN_MARGIN_S = 10.0
_MAX_STREAM_S = 3600.0
"""A previous ingress ends when its last request does. Where no engine follows, that is after `driver_wait_s`."""
_ON_HEAD = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
"""The head node is the one without which there is no cluster: what is there is not lost with another node."""
_QUICK = {"health_check_period_s": 1.0, "health_check_timeout_s": 10.0, "graceful_shutdown_wait_loop_s": 0.1}


class RefusedError(ConfigError, RayServeException, ClickException):
    """A `ConfigError` that `serve status` and `serve run` show as its one line: of others they show tracebacks."""

    def __init__(self, message: str):
        ClickException.__init__(self, message)


def build_app(args: dict[str, Any]) -> serve.Application:
    """The application for settings named as the fields of `EngineConfig` and `ServerConfig`.

    Address and port are Serve's own (`http_options`), and keys must come from a file, because Ray's dashboard shows
    `args`: either is a `ConfigError` here, and so is a model that cannot be served.
    """
    try:
        engine, server = _parse(args)
        check_model(engine)
    except ConfigError as error:
        raise RefusedError(str(error)) from None
    return application(engine, server)


def _parse(args: dict[str, Any]) -> tuple[EngineConfig, ServerConfig]:
    settings = {name.replace("-", "_"): value for name, value in args.items()}
    engine, server = parse_settings(settings)
    for name in ("host", "port"):
        if name in settings:
            raise ConfigError(f"{name} is Serve's to set: give http_options.{name} (serve run: not at all)")
    if any(not key.startswith("@") for key in server.api_key):
        raise ConfigError("api_key as plain text would show in Ray's dashboard: write it to a file and give @FILE")
    return engine, server


def check_model(engine: EngineConfig) -> None:
    """Finds what is wrong with the model's folder before Serve deploys anything: `ConfigError`, one line with file and
    field. Asks nothing of the devices, which are another machine's; where there are several machines, a folder that is
    not on this one may be on those that serve it.
    """
    from rayllm.engine.owner.resolve import resolve
    from rayllm.text.tokenizer import Tokenizer
    from rayllm.weights.checkpoint import Checkpoint
    from rayllm.weights.hub import downloaded_folder
    from rayllm.weights.hub_model import HubModel

    hub = HubModel.of(engine)
    is_here = Path(engine.model).expanduser().exists() if hub is None else downloaded_folder(hub) is not None
    if not is_here and _num_nodes() > 1:
        return
    size = engine.layout.num_ranks
    resolved = resolve(engine, num_gpus=size, num_cores=size, backend="ray")
    Tokenizer.from_config(resolved)
    if engine.load_format != "dummy":
        Checkpoint(resolved.model_path, engine.load_format)


def _num_nodes() -> int:
    return len(cluster_nodes()) if ray_is_initialized() else 1


def application(engine: EngineConfig, server: ServerConfig) -> serve.Application:
    """Ingress and engine as deployments of one application; requests go by the engine's own sockets.

    When Serve replaces both, the previous ingress outlives the previous engine: what is open goes on with the next one.
    """
    shutdown_timeout_s = server.shutdown_timeout_s + _SHUTDOWN_MARGIN_S
    owner = serve.deployment(EngineReplica).options(
        name=ENGINE,
        num_replicas=1,
        ray_actor_options=_ON_HEAD,
        max_constructor_retry_count=2,
        graceful_shutdown_timeout_s=shutdown_timeout_s,
        **_QUICK,
    )
    ingress = serve.deployment(serve.ingress(asgi_builder(engine, server))(Ingress)).options(
        name=INGRESS,
        num_replicas=server.num_ingress_replicas,
        ray_actor_options=_ON_HEAD if server.num_ingress_replicas == 1 else {"num_cpus": 0},
        max_ongoing_requests=_MAX_OPEN_REQUESTS,
        graceful_shutdown_timeout_s=_MAX_STREAM_S,
        **_QUICK,
    )
    return ingress.bind(owner.bind(engine, server.shutdown_timeout_s))
