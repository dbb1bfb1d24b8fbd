"""A server that runs: what it says of itself, and what Serve and the driver say of it."""

from __future__ import annotations

import itertools
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rayllm.config import EngineConfig, ServerConfig
from rayllm.errors import EngineError
from rayllm.executor.ray_join import cluster_address
from rayllm.executor.ray_watch import RayWatch

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview

    from rayllm.engine.driver.actor import EngineDescription
    from rayllm.executor.worker_process import WorkerPlace

_POLL_S = 0.1
STATUS_PERIOD_S = 0.3
"""Between two questions to Serve for its applications: each costs it and us about 30 ms of CPU, just when both have
enough to do."""
_POLLS_PER_STATUS = 10
_ASK_TIMEOUT_S = 10.0
StageListener = Callable[[str], None]

_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows nothing of our loopback

APP_PREFIX = "rayllm-"


def app_name(engine_name: str) -> str:
    """The Serve application that holds the engine of this name."""
    return f"{APP_PREFIX}{engine_name}"


def server_url(server: ServerConfig) -> str:
    """Where a client on this machine reaches it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(server.host, server.host)
    return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{server.port}"


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
            if number % _POLLS_PER_STATUS == 0:
                self.application()
            if time.monotonic() > deadline:
                raise EngineError(f"the server was not ready within {timeout_s:g} s; last seen: {stage or 'starting'}")
            time.sleep(_POLL_S)

    def wait_ingress(self) -> None:
        """Returns once an ingress replica runs: from then on Serve's proxy has somebody to ask. `EngineError` where
        none comes."""
        from rayllm.serve.builder import INGRESS

        while True:
            ingress = self.application().deployments.get(INGRESS)
            if ingress is not None and ingress.replica_states.get("RUNNING"):
                return
            time.sleep(STATUS_PERIOD_S)

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
        """The engine's resolved config, blocks and processes, as its driver reports them."""
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
