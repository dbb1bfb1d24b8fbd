"""RayLLM's application in Serve: Serve is started or joined, the application deployed, drained and deleted."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from rayllm.config import EngineConfig, ServerConfig
from rayllm.errors import ConfigError, EngineError
from rayllm.executor.ray_private import connected_node
from rayllm.machine.ports import check_port
from rayllm.serve.running_server import (
    APP_PREFIX,
    STATUS_PERIOD_S,
    RunningServer,
    StageListener,
    app_name,
    failure_reason,
)
from rayllm.serve.serve_private import serve_address

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_LAST_RESPONSES_S = 2.0
"""For the ingress to say at `/health` that Ray has died; then its clients' last events have `_LAST_EVENTS_S`."""
_LAST_EVENTS_S = 0.5
_DRAIN_CALL_TIMEOUT_S = 2.0
_END_TIMEOUT_S = 3.0
_DELETE_TIMEOUT_S = 15.0
"""For Serve to delete the application, once its requests have ended. An ingress that was replaced while it streamed may
have some left, and Serve would give it an hour."""
_STOP_TIMEOUT_S = _END_TIMEOUT_S + _DELETE_TIMEOUT_S + 4.0
"""For Serve to stop, beside the time of open requests."""
_LOG_TAIL_BYTES = 4000


@contextlib.contextmanager
def deployed(running: RunningServer, on_stage: StageListener) -> Iterator[None]:
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
        _copy_error_logs()
        raise
    finally:
        on_stage("stopping")
        if running.ray.error is None:
            _stop_serve_in_time(running, ends_serve=not joins)
        if running.ray.error is not None:
            _await_last_responses(running)


def joins_serve(server: ServerConfig) -> bool:
    """Whether Serve runs already in a Ray cluster that was joined. `ConfigError` where it has no place for this server:
    all that Serve serves is at one address, and an engine takes all paths there."""
    from ray import serve

    status = serve.status()
    if not status.proxies and not status.applications:
        check_port(server.host, server.port)
        return False
    if taken := next((name for name in status.applications if name.startswith(APP_PREFIX)), None):
        raise ConfigError(
            f"engine {taken.removeprefix(APP_PREFIX)!r} is served in this Ray cluster already, which has one address: "
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
        raise EngineError(
            f"Serve did not start ({failure_reason(str(error))}): check the machine's load and memory, then try again"
        ) from error


def _deploy(engine: EngineConfig, server: ServerConfig) -> None:
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from rayllm.serve.builder import application

    target = serve.RunTarget(target=application(engine, server), name=app_name(engine.name), route_prefix="/")
    try:
        serve.run_many([target], wait_for_applications_running=False)
    except RayServeException as error:  # another application has all paths
        said = failure_reason(str(error)).rpartition("Exception: ")[2]
        raise ConfigError(
            f"Serve does not deploy the engine ({said}): delete the other application, or unset RAY_ADDRESS for a Ray "
            "of its own"
        ) from error


def _stop_serve_in_time(running: RunningServer, *, ends_serve: bool) -> None:
    """`_stop_serve`, abandoned where Ray dies or Serve exceeds its time limit."""
    timeout_s = running.server.shutdown_timeout_s + _STOP_TIMEOUT_S
    try:
        running.ray.call(lambda: _stop_serve(running, ends_serve=ends_serve), timeout_s)
    except (EngineError, TimeoutError) as error:
        logger.warning("Serve did not shut down cleanly: %s", error)


def _await_last_responses(running: RunningServer) -> None:
    """Ray has died, and its processes may run on for a while: gives the ingress time to end its clients' streams."""
    deadline = time.monotonic() + _LAST_RESPONSES_S
    while time.monotonic() < deadline and running.health(timeout_s=_LAST_EVENTS_S)[0]:
        time.sleep(_POLL_S)
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
                logger.warning(
                    "a replica of %s still has open streams after %g s: shutting down without waiting for it",
                    name,
                    _DELETE_TIMEOUT_S,
                )
                return
            time.sleep(STATUS_PERIOD_S)
        if running.owns_ray or (ends_serve and not applications):
            serve.shutdown()
    except Exception:
        logger.warning("Serve did not shut down cleanly", exc_info=True)


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
        time.sleep(_POLL_S)


def _copy_error_logs() -> None:
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
