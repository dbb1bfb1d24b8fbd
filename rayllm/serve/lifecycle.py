"""Starts Ray, Serve and RayLLM's application on this machine (or in the cluster at RAY_ADDRESS), and ends them so
that nothing is left.

    with running_server(EngineConfig(model=...), ServerConfig(port=0)) as server:
        httpx.get(server.url + "/v1/models")
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayllm.config import RAY_NAMESPACE, EngineConfig, Environment, ServerConfig
from rayllm.errors import ConfigError, EngineError
from rayllm.serve.processes import Process, descendants, end_all

logger = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 128 * 2**20
_DRAIN_MARGIN_S = 5.0
_PROCESS_GRACE_S = 10.0
StageListener = Callable[[str], None]


def app_name(engine_name: str) -> str:
    """The Serve application that holds the engine of this name."""
    return f"rayllm-{engine_name}"


@dataclass
class RunningServer:
    """A server that answers at `url`; made by `running_server`."""

    engine: EngineConfig
    server: ServerConfig
    url: str
    owns_ray: bool
    processes: set[Process] = field(default_factory=set)
    """What this process started, as far as seen: Ray's own, Serve's, ours."""

    def health(self, timeout_s: float = 2.0) -> tuple[bool, str]:
        """Whether the server is ready, and what it says of itself: its stage, or why it cannot be asked."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=timeout_s):
                return True, "ready"
        except urllib.error.HTTPError as error:
            return False, _stage_of(error.read())
        except (OSError, ValueError) as error:
            return False, f"not reachable: {error}"

    def wait_ready(self, on_stage: StageListener, timeout_s: float | None = None) -> None:
        """Returns once requests are served. `EngineError` with the engine's own reason when it cannot start."""
        deadline = time.monotonic() + (timeout_s or float("inf"))
        last = ""
        while True:
            ready, stage = self.health()
            if ready:
                return
            if stage != last and not stage.startswith("not reachable"):
                on_stage(stage)
                last = stage
            self.raise_if_failed()
            if time.monotonic() > deadline:
                raise EngineError(f"the server was not ready within {timeout_s:g} s; last seen: {stage or 'starting'}")
            time.sleep(0.1)

    def raise_if_failed(self) -> None:
        """`EngineError` when Serve has given up on the application."""
        from ray import serve

        status = serve.status().applications.get(app_name(self.engine.name))
        if status is None or status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            messages = [status.message, *(d.message for d in status.deployments.values())] if status else [""]
            raise EngineError(failure_reason("\n".join(filter(None, messages))))

    def describe(self) -> dict[str, Any]:
        """What runs where, as the driver tells it, with the pids of the ingress replicas."""
        import ray

        from rayllm.engine.driver import driver_name

        driver = ray.get_actor(driver_name(self.engine.name), namespace=RAY_NAMESPACE)
        return dict(ray.get(driver.describe.remote(), timeout=10))

    def note_processes(self) -> None:
        """Remembers the processes that run now, so that `running_server` can see them end."""
        if self.owns_ray:
            self.processes |= descendants()


def failure_reason(message: str) -> str:
    """The one line of a remote traceback that tells a person what went wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("rayllm.errors.")]
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception")) and ":" in line]
    line = (ours or errors or lines or ["the engine could not start"])[-1]
    return line.partition(": ")[2] if ours else line


def _stage_of(body: bytes) -> str:
    try:
        answer = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(answer, dict):
        return ""
    error = answer.get("error")
    message = error.get("message", "") if isinstance(error, dict) else ""
    return str(answer.get("stage") or message)


@contextlib.contextmanager
def running_server(
    engine: EngineConfig,
    server: ServerConfig,
    *,
    on_stage: StageListener = lambda stage: None,
    wait: bool = True,
    timeout_s: float | None = None,
) -> Iterator[RunningServer]:
    """A server for the length of the block. It joins the Ray that this process is connected to, or the one at
    RAY_ADDRESS, or starts one of its own, which ends with the block together with every process of it.

    `on_stage` hears what is being done. `wait=False` yields as soon as the application is deployed.
    """
    server = server.model_copy(update={"port": server.port or free_port(server.host)})
    server.read_api_keys()
    check_port(server.host, server.port)
    before = descendants()
    with _ray(engine, server, on_stage) as owns_ray:
        running = RunningServer(engine, server, _url(server), owns_ray)
        try:
            on_stage("starting Serve")
            _start_serve(server)
            _deploy(engine, server)
            if wait:
                running.wait_ready(on_stage, timeout_s)
            running.note_processes()
            yield running
        finally:
            running.note_processes()
            on_stage("stopping")
            _stop_serve(running)
    if owns_ray:
        left = end_all(running.processes - before, grace_s=_PROCESS_GRACE_S)
        if left:
            logger.warning("killed processes that did not end: %s", sorted(process.pid for process in left))


def check_port(host: str, port: int) -> None:
    """`ConfigError` when nothing can listen there."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except OSError:
        raise ConfigError(f"host={host!r} is not an address of this machine: use 127.0.0.1 or 0.0.0.0") from None
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            raise ConfigError(f"port={port} needs rights that you do not have: use one above 1023") from None
        except OSError as error:
            in_use = f"port={port} on {host} is in use: choose another with --port, or --port 0 for a free one"
            no_host = f"host={host!r} is not an address of this machine: use 127.0.0.1 or 0.0.0.0"
            raise ConfigError(in_use if error.errno == 98 else no_host) from None


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _url(server: ServerConfig) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(server.host, server.host)
    return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{server.port}"


# ------------------------------------------------------------------------------------------------------------- Ray


@contextlib.contextmanager
def _ray(engine: EngineConfig, server: ServerConfig, on_stage: StageListener) -> Iterator[bool]:
    """A connection to Ray for the length of the block; yields whether Ray is our own and ends with it."""
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield False
        return
    address = Environment.ray_address()
    prepare_environment(own_cluster=address is None)
    on_stage("joining Ray" if address else "starting Ray")
    # A short path: the sockets below it may have 107 bytes at most.
    temp_dir = tempfile.mkdtemp(prefix="rl-", dir="/tmp" if os.path.isdir("/tmp") else None)
    try:
        yield from _connected_ray(engine, server, address, temp_dir)
    finally:
        shutil.rmtree(temp_dir, ignore_errors=True)


def _connected_ray(engine: EngineConfig, server: ServerConfig, address: str | None, temp_dir: str) -> Iterator[bool]:
    import ray

    common: dict[str, Any] = {"namespace": RAY_NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            ray.init(address=address, **common)
        else:
            _move_haproxy(temp_dir)
            ray.init(
                address="local",
                num_cpus=num_logical_cpus(engine, server),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=temp_dir,
                **common,
            )
        yield address is None
    except ConnectionError as error:
        raise EngineError(f"no Ray cluster answers at RAY_ADDRESS={address!r}: {error}") from None
    finally:
        ray.shutdown()


def num_logical_cpus(engine: EngineConfig, server: ServerConfig) -> int:
    """CPUs to tell our own Ray of: the real ones, or as many as the driver, workers and ingresses are counted for."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(num_cores, 1 + engine.tensor_parallel_size + server.num_ingress_replicas)


def prepare_environment(*, own_cluster: bool) -> None:
    """Settings that Ray and its children read from the environment; must come before Ray is imported."""
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_AUTH_MODE": "token",
    }
    if own_cluster:
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # listen on loopback alone
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if os.environ["RAY_AUTH_MODE"] == "token":
        ensure_ray_token()
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")


def ensure_ray_token() -> None:
    """Ray's token file, where no token is given otherwise: made when missing, readable by its owner alone."""
    if Environment.has_ray_token():
        return
    path = Path.home() / ".ray" / "auth_token"
    if path.exists():
        with contextlib.suppress(OSError):
            path.chmod(0o600)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # another process was first: its token serves us too
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))


def _move_haproxy(temp_dir: str) -> None:
    """Keeps HAProxy's files in our folder and its two side ports off the fixed numbers that others may use."""
    if not Environment.ha_proxy():
        return
    settings = {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{temp_dir}/haproxy/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{temp_dir}/haproxy/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": f"{temp_dir}/haproxy",
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{temp_dir}/haproxy/server-state",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
    }
    os.environ.update(settings)


# ----------------------------------------------------------------------------------------------------------- Serve


def _start_serve(server: ServerConfig) -> None:
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": server.host, "port": server.port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )


def _deploy(engine: EngineConfig, server: ServerConfig) -> None:
    from ray import serve

    from rayllm.serve.builder import build_app

    target = serve.RunTarget(
        target=build_app({**engine.model_dump(), **server.model_dump()}),
        name=app_name(engine.name),
        route_prefix="/",
    )
    serve.run_many([target], wait_for_applications_running=False)


def _stop_serve(running: RunningServer) -> None:
    """Ends the application, giving open requests their time, then Serve. Whatever fails here, Ray's end follows."""
    from ray import serve

    try:
        serve.delete(app_name(running.engine.name))
        serve.shutdown()
    except Exception:
        logger.warning("Serve did not stop in order", exc_info=True)
