"""Starts Ray, Serve and RayLLM's application on this machine (or in the cluster at RAY_ADDRESS), and ends them so
that nothing is left.

    with running_server(EngineConfig(model=...), ServerConfig(port=0)) as server:
        httpx.get(server.url + "/v1/models")
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rayllm.config import EngineConfig, Environment, ServerConfig, count_cores
from rayllm.errors import ConfigError, EngineError
from rayllm.executor.ray_cluster import connected_ray, free_port
from rayllm.executor.ray_connection import ray_is_initialized, ray_watch
from rayllm.executor.ray_join import cluster_address, ray_token_in_use
from rayllm.executor.ray_private import connected_node
from rayllm.executor.ray_watch import RayWatch
from rayllm.machine.ports import port_holder
from rayllm.serve.proxy.early_port import EarlyPort
from rayllm.serve.proxy.haproxy import proxy_environment
from rayllm.serve.serve_private import serve_address

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview

    from rayllm.engine.driver.actor import EngineDescription
    from rayllm.executor.worker_process import WorkerPlace

logger = logging.getLogger(__name__)

_LOOK_PERIOD_S = 0.1
_STATUS_PERIOD_S = 0.3
"""Between two questions to Serve for its applications: each costs it and us about 30 ms of CPU, just when both have
enough to do."""
_LOOKS_PER_STATUS = 10
_ASK_TIMEOUT_S = 10.0
_LAST_WORDS_S = 2.0
"""For the ingress to say at `/health` that Ray has died; then its clients' last events have `_LAST_EVENTS_S`."""
_LAST_EVENTS_S = 0.5
_DRAIN_CALL_TIMEOUT_S = 2.0
_DRAIN_POLL_S = 0.1
_END_TIMEOUT_S = 3.0
_DELETE_TIMEOUT_S = 15.0
"""For Serve to end the application, once its requests have ended. An ingress that was replaced while it streamed may
have some left, and Serve would give it an hour."""
_STOP_TIMEOUT_S = _END_TIMEOUT_S + _DELETE_TIMEOUT_S + 4.0
"""All that Serve may take to stop, beside the time of open requests."""
_LOG_TAIL_BYTES = 4000
StageListener = Callable[[str], None]


_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows nothing of our loopback


_APP_PREFIX = "rayllm-"


def app_name(engine_name: str) -> str:
    """The Serve application that holds the engine of this name."""
    return f"{_APP_PREFIX}{engine_name}"


@dataclass
class RunningServer:
    """A server that answers at `url`; made by `running_server`."""

    engine: EngineConfig
    server: ServerConfig
    url: str
    owns_ray: bool
    ray: RayWatch = field(default_factory=lambda: RayWatch([]))
    """Over the Ray that it runs in; no question to Ray is asked but through it."""

    def health(self, timeout_s: float = 2.0) -> tuple[bool, str]:
        """Whether the server is ready, and what it says of itself: its stage, or why it cannot be asked."""
        try:
            with _http.open(f"{self.url}/health", timeout=timeout_s):
                return True, "ready"
        except urllib.error.HTTPError as error:
            return False, _stage_of(error.read())
        except (OSError, ValueError) as error:
            return False, f"not reachable: {error}"

    def has_page(self, path: str) -> bool:
        """Whether the server shows something there."""
        try:
            with _http.open(f"{self.url}{path}", timeout=5.0):
                return True
        except (OSError, ValueError):
            return False

    def wait_ready(self, on_stage: StageListener, timeout_s: float | None = None) -> None:
        """Returns once requests are served. `EngineError` with the engine's own reason when it cannot start."""
        deadline = time.monotonic() + (timeout_s or float("inf"))
        last = ""
        for number in itertools.count(1):
            ready, stage = self.health()
            if ready:
                return
            self.ray.raise_if_lost()
            if stage != last and not stage.startswith("not reachable"):
                on_stage(stage)
                last = stage
            if number % _LOOKS_PER_STATUS == 0:
                self.application()
            if time.monotonic() > deadline:
                raise EngineError(f"the server was not ready within {timeout_s:g} s; last seen: {stage or 'starting'}")
            time.sleep(_LOOK_PERIOD_S)

    def wait_ingress(self) -> None:
        """Returns once an ingress replica runs: from then on Serve's proxy has somebody to ask. `EngineError` where
        none comes."""
        from rayllm.serve.builder import INGRESS

        while True:
            ingress = self.application().deployments.get(INGRESS)
            if ingress is not None and ingress.replica_states.get("RUNNING"):
                return
            time.sleep(_STATUS_PERIOD_S)

    def application(self) -> ApplicationStatusOverview:
        """What Serve says of the application. `EngineError` when it has given up on it."""
        from ray import serve

        status = self.ray.call(serve.status).applications.get(app_name(self.engine.name))
        if status is None or status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            messages = [status.message, *(d.message for d in status.deployments.values())] if status else [""]
            raise EngineError(failure_reason("\n".join(filter(None, messages))))
        return status

    @property
    def ray_address(self) -> str:
        """`host:port` of the Ray in which the engine runs."""
        return cluster_address()

    def describe(self) -> EngineDescription:
        """The engine's resolved config, blocks and processes, as its driver tells them."""
        import ray

        from rayllm.engine.discovery import find_driver

        def ask() -> EngineDescription:
            description: EngineDescription = ray.get(find_driver(self.engine.name).describe.remote(), timeout=10)
            return description

        return self.ray.call(ask)

    def ingress_place(self) -> WorkerPlace:
        """Where an ingress replica runs."""
        from ray import serve

        place: WorkerPlace = serve.get_app_handle(app_name(self.engine.name)).place.remote().result(timeout_s=10)
        return place

    def engine_watch(self) -> Callable[[], None]:
        """A function that raises `EngineError` when the engine failed and is not started again."""
        from ray import serve

        from rayllm.serve.builder import ENGINE

        handle = self.ray.call(lambda: serve.get_deployment_handle(ENGINE, app_name(self.engine.name)))

        def raise_if_failed() -> None:
            try:
                failure = self.ray.call(lambda: handle.failure.remote().result(timeout_s=5), _ASK_TIMEOUT_S)
            except Exception:  # no replica, or a busy one: Serve is at it
                return
            if failure is not None:
                raise EngineError(failure)

        return raise_if_failed


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

    def tell(stage: str) -> None:
        if early is not None:
            early.stage = stage
        on_stage(stage)

    tell("connecting to Ray" if joins else "starting Ray")
    try:
        with _ray(engine, server) as owns_ray:
            running = RunningServer(engine, server, server_url(server), owns_ray, ray_watch())
            on_ray(running.ray_address, ray_token_in_use())
            with _application(running, tell):
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
def _application(running: RunningServer, on_stage: StageListener) -> Iterator[None]:
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    ask = running.ray.call
    joins = not running.owns_ray and ask(lambda: joins_serve(running.server))
    try:
        if not joins:
            on_stage("starting Serve")
            ask(lambda: _start_serve(running.server))
        ask(lambda: _deploy(running.engine, running.server))
        yield
    except Exception:
        _log_what_processes_said()
        raise
    finally:
        on_stage("stopping")
        if running.ray.error is None:
            _stop_serve_in_time(running, ends_serve=not joins)
        if running.ray.error is not None:
            _await_last_words(running)


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
            holder = port_holder(port)
            by = f" by {holder}" if holder else ""
            in_use = f"port={port} on {host} is in use{by}: choose another with --port, or --port 0 for a free one"
            no_host = f"host={host!r} is not an address of this machine: use 127.0.0.1 or 0.0.0.0"
            raise ConfigError(in_use if error.errno == 98 else no_host) from None


def server_url(server: ServerConfig) -> str:
    """Where a client on this machine reaches it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(server.host, server.host)
    return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{server.port}"


# ------------------------------------------------------------------------------------------------------------- Ray


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


# ----------------------------------------------------------------------------------------------------------- Serve


def joins_serve(server: ServerConfig) -> bool:
    """Whether Serve runs already in a Ray cluster that was joined. `ConfigError` where it has no place for this server:
    all that Serve serves is at one address, and an engine takes all paths there."""
    from ray import serve

    status = serve.status()
    if not status.proxies and not status.applications:
        check_port(server.host, server.port)
        return False
    if taken := next((name for name in status.applications if name.startswith(_APP_PREFIX)), None):
        raise ConfigError(
            f"engine {taken.removeprefix(_APP_PREFIX)!r} is served in this Ray cluster already, which has one address: "
            f"stop it first ('rayllm stop', or 'serve delete {taken}'), or unset RAY_ADDRESS for a Ray of its own"
        )
    host, port = serve_address()
    if (host, port) != (server.host, server.port):
        raise ConfigError(
            f"Serve runs in this Ray cluster already, at {host}:{port}, and not at {server.host}:{server.port}: "
            f"give --host {host} --port {port}"
        )
    return True


def _start_serve(server: ServerConfig) -> None:
    import ray
    from ray import serve

    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": server.host, "port": server.port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
    except ray.exceptions.RayError as error:
        raise EngineError(f"Serve did not start, is the machine too busy? {failure_reason(str(error))}") from error


def _deploy(engine: EngineConfig, server: ServerConfig) -> None:
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from rayllm.serve.builder import application

    target = serve.RunTarget(target=application(engine, server), name=app_name(engine.name), route_prefix="/")
    try:
        serve.run_many([target], wait_for_applications_running=False)
    except RayServeException as error:  # another application has all paths
        said = failure_reason(str(error)).rpartition("Exception: ")[2]
        raise ConfigError(f"Serve refuses the engine ({said}): stop the other, or unset RAY_ADDRESS") from error


def _stop_serve_in_time(running: RunningServer, *, ends_serve: bool) -> None:
    """`_stop_serve`, given up where Ray dies meanwhile or Serve takes longer than it may."""
    timeout_s = running.server.shutdown_timeout_s + _STOP_TIMEOUT_S
    try:
        running.ray.call(lambda: _stop_serve(running, ends_serve=ends_serve), timeout_s)
    except (EngineError, TimeoutError) as error:
        logger.warning("Serve did not stop in order: %s", error)


def _await_last_words(running: RunningServer) -> None:
    """Ray is dead, and the processes that it started may live on for a while: gives the ingress the time to tell its
    clients."""
    deadline = time.monotonic() + _LAST_WORDS_S
    while time.monotonic() < deadline and running.health(timeout_s=_LAST_EVENTS_S)[0]:
        time.sleep(_LOOK_PERIOD_S)
    time.sleep(_LAST_EVENTS_S)


def _stop_serve(running: RunningServer, *, ends_serve: bool) -> None:
    """Ends the application, giving open requests their time, then Serve, unless somebody else uses it. Whatever fails
    here, the end of our own Ray follows."""
    from ray import serve

    name = app_name(running.engine.name)
    try:
        _drain(running)
        serve.delete(name, _blocking=False)
        deadline = time.monotonic() + _DELETE_TIMEOUT_S
        while name in (applications := serve.status().applications):
            if time.monotonic() > deadline:
                logger.warning("a replica is still at its last streams after %g s", _DELETE_TIMEOUT_S)
                return
            time.sleep(_STATUS_PERIOD_S)
        if running.owns_ray or (ends_serve and not applications):
            serve.shutdown()
    except Exception:
        logger.warning("Serve did not stop in order", exc_info=True)


def _drain(running: RunningServer) -> None:
    """Has every ingress replica refuse new requests with 503, gives the open ones their time, then ends them.

    Comes before Serve deletes the application, because then its proxy knows no more than 404.
    """
    with contextlib.suppress(Exception):  # not deployed, or dead: nothing to wait for
        if not _drained(running, running.server.shutdown_timeout_s, end=False):
            _drained(running, _END_TIMEOUT_S, end=True)


def _drained(running: RunningServer, timeout_s: float, *, end: bool) -> bool:
    """Whether no request was open on any ingress replica before the time was up."""
    from ray import serve

    deadline = time.monotonic() + timeout_s
    ingress = serve.get_app_handle(app_name(running.engine.name))
    open_by_replica: dict[int, int] = {}
    while True:
        for _ in range(2 * running.server.num_ingress_replicas):  # Serve picks a replica for each call
            replica, num_open = ingress.drain.remote(end).result(timeout_s=_DRAIN_CALL_TIMEOUT_S)
            open_by_replica[replica] = num_open
        if len(open_by_replica) >= running.server.num_ingress_replicas and not any(open_by_replica.values()):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_DRAIN_POLL_S)


def _log_what_processes_said() -> None:
    """Copies the ends of Ray's log files that hold errors into our log, before they go with Ray's folder."""
    node = connected_node()
    if node is None:
        return
    folder = Path(node.get_session_dir_path()) / "logs"
    for path in sorted([*folder.glob("serve/*.log"), *folder.glob("worker-*.err")]):
        with contextlib.suppress(OSError):
            text = path.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
            if "rror" in text:
                logger.error("---- %s\n%s", path.name, text)
