"""The driver: one actor an engine, which plans tokens. It owns the workers, the step loop and the clients'
sockets.

Ray finds it by name (`rayllm:<engine>:driver` in namespace `rayllm`); requests and tokens go over
`engine.driver.link`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import selectors
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from rayllm.config import ResolvedConfig
from rayllm.engine.address import DriverAddress
from rayllm.engine.driver.fault_injection import KilledWorker, kill_rank
from rayllm.engine.driver.link import ClientGone, ClientLink
from rayllm.engine.driver.loop import EngineLoop
from rayllm.errors import EngineError
from rayllm.executor.executor import Executor, Selectable
from rayllm.executor.worker import RunnerFactory
from rayllm.executor.worker_process import WorkerPlace, worker_place
from rayllm.models.memory_plan import fit_context
from rayllm.observability.logs import setup_logging
from rayllm.observability.statistics import PERIOD_S as STATISTICS_PERIOD_S
from rayllm.observability.statistics import StatisticsLine
from rayllm.observability.trace import open_tracer

log = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 10.0


# ------------------------------------------------------------------------------------------ the loop's thread


class Steps(Protocol):
    """What the thread drives: `EngineLoop`."""

    def submit(self, client: int, message: Any) -> None: ...

    def client_gone(self, client: int) -> None: ...

    def step(self, poll: Callable[[float], None] | None = None) -> bool: ...

    def check(self) -> None: ...

    @property
    def is_interrupted(self) -> bool: ...

    @property
    def deadline_in_s(self) -> float | None: ...


def run_loop(
    loop: Steps,
    link: ClientLink,
    executor: Executor,
    stop: threading.Event,
    on_failed: Callable[[EngineError], None],
) -> None:
    """The loop's thread: messages in, a step, and so on until `stop` is set (and `link.wake` called). Without
    work it blocks until a message comes, a worker is lost or a request's deadline passes. Messages are taken while a
    step runs too: a refusal, an abort or stats do not wait for it.

    The loop has a lost worker replaced. When that fails, `on_failed` is called once, and from then on the loop
    only answers: new requests are refused with the reason.
    """
    with selectors.DefaultSelector() as waiting:
        waiting.register(link, selectors.EVENT_READ)
        watched: Selectable | None = None

        def take_messages() -> None:
            for client, event in link.drain():
                if isinstance(event, ClientGone):
                    loop.client_gone(client)
                else:
                    loop.submit(client, event)

        def wait(results: Selectable | None, timeout_s: float | None) -> None:
            """Until there are messages, or something comes from the workers."""
            nonlocal watched
            if results is not watched:
                if watched is not None:
                    waiting.unregister(watched)
                if results is not None:
                    waiting.register(results, selectors.EVENT_READ)
                watched = results
            waiting.select(timeout_s)

        def poll(timeout_s: float) -> None:
            wait(executor.result_socket(), timeout_s)
            take_messages()

        while not stop.is_set():
            take_messages()
            try:
                if loop.step(poll):
                    continue
                loop.check()
            except EngineError as error:
                on_failed(error)
            wait(None if loop.is_interrupted else executor.result_socket(), loop.deadline_in_s)


# ---------------------------------------------------------------------------------------------- the driver


@dataclass(frozen=True)
class EngineDescription:
    """What runs where."""

    config: str
    """The resolved config as JSON."""
    served_model_name: str
    num_blocks: int
    driver: WorkerPlace
    workers: tuple[WorkerPlace, ...]
    standby_is_ready: bool = False
    """Whether a spare worker could take a lost one's place now."""


class Driver:
    """An engine's processes seen from its middle, without Ray: `start`, then clients connect to `link`, then
    `close`.

    `make_executor(config, on_stage)` brings the workers up; it is called by `start`.
    """

    def __init__(self, make_executor: Callable[[ResolvedConfig, Callable[[str], None]], Executor]):
        self._make_executor = make_executor
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._because = ""
        self.stage = "starting the driver"
        self.failure: str | None = None
        self._on_failed: Callable[[str], None] = lambda reason: None
        self.executor: Executor | None = None
        self.config: ResolvedConfig | None = None
        self.link: ClientLink | None = None

    def start(
        self,
        config: ResolvedConfig,
        num_restarts: int = 0,
        previous_failure: str = "",
        on_failed: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Brings workers and loop up; clients are served when it returns, as `self.config` says. Raises what the
        executor raises.

        `num_restarts`: drivers of this engine that came before; `previous_failure`: why the last one failed, which the
        stages tell until this one is ready."""
        from rayllm.engine.owner.local import build_scheduler

        self._on_failed = on_failed
        self._because = f" (the previous driver failed: {previous_failure})" if previous_failure else ""
        try:
            self.executor = self._make_executor(config, self._set_stage)
            self.config = config = fit_context(config, self.executor.num_blocks)
            self.link = ClientLink()
            scheduler = build_scheduler(config, self.executor.num_blocks)
            loop = EngineLoop(
                config,
                scheduler,
                self.executor,
                self.link.send,
                wake=self.link.wake,
                tracer=open_tracer(config.engine.otlp_traces_endpoint, "driver"),
                num_driver_restarts=num_restarts,
            )
        except BaseException as error:
            self._set_stage(f"failed: {error}")
            self.close()
            raise
        arguments = loop, self.link, self.executor, self._stop, self._fail
        self._thread = threading.Thread(target=self._run, args=arguments, name="engine-loop", daemon=True)
        self._thread.start()
        self._statistics = threading.Thread(target=self._say_statistics, args=(loop,), name="statistics", daemon=True)
        self._statistics.start()
        self._because = ""
        self.stage = "ready"

    def address(self, node_id: str = "") -> DriverAddress:
        """Where clients connect. Raises `EngineError` before `start` has returned."""
        if self.link is None:
            raise EngineError(f"the engine is not ready: {self.stage}", code="engine_not_ready")
        host, port = self.link.tcp_address or (None, None)
        return DriverAddress(node_id, self.link.unix_path, self.link.token, host, port)

    def close(self) -> None:
        """Ends loop, clients' sockets and workers; idempotent."""
        self._stop.set()
        executor, link, thread = self.executor, self.link, self._thread
        if link is not None and thread is not None and thread.is_alive():
            link.wake()
            thread.join(_JOIN_TIMEOUT_S)
        if executor is not None:
            executor.close()  # a loop that hangs in a step sees its workers go
        if link is not None:
            link.close()

    def _run(self, *arguments: Any) -> None:
        try:
            run_loop(*arguments)
        except Exception as error:
            if not self._stop.is_set():
                log.exception("the step loop's thread died")
                self._fail(EngineError(f"the step loop's thread died: {type(error).__name__}: {error}"))

    def _say_statistics(self, loop: EngineLoop) -> None:
        assert self.config is not None
        line = StatisticsLine(time.monotonic(), loop.counters.sample(), is_gpu=self.config.device == "cuda")
        while not self._stop.wait(STATISTICS_PERIOD_S):
            if (text := line.look(time.monotonic(), loop.counters.sample())) is not None:
                log.info(text)

    def _fail(self, error: EngineError) -> None:
        self.failure = str(error)
        self.stage = f"failed: {error}"
        log.error("engine failed: %s", error)
        self._on_failed(self.failure)

    def _set_stage(self, stage: str) -> None:
        self.stage = stage + self._because


class DriverActor:
    """The Ray actor round a `Driver`. Its calls are of the lifecycle; none is made while tokens flow."""

    def __init__(self, placement_group: Any, runner_factory: RunnerFactory | None = None):
        from rayllm.executor.group import WorkerGroup

        def make_executor(config: ResolvedConfig, on_stage: Callable[[str], None]) -> Executor:
            return WorkerGroup(config, on_stage, placement_group, runner_factory)

        self._driver = Driver(make_executor)
        self._failed = asyncio.Event()

    async def start(self, resolved_config_json: str, num_restarts: int = 0, previous_failure: str = "") -> str:
        """Returns when requests are served: the config as JSON, with the context that fits."""
        event_loop = asyncio.get_running_loop()

        def on_failed(reason: str) -> None:
            event_loop.call_soon_threadsafe(self._failed.set)

        config = ResolvedConfig.model_validate_json(resolved_config_json)
        setup_logging(config.engine.log_format, process="driver", file=config.engine.log_file)
        try:
            await asyncio.to_thread(self._driver.start, config, num_restarts, previous_failure, on_failed)
        except EngineError as error:
            raise EngineError(str(error), code=error.code) from None  # subclasses do not all survive a pickle
        gc.collect()
        gc.freeze()  # what is here to stay need not be looked at by the collector between two steps
        assert self._driver.config is not None
        return self._driver.config.model_dump_json()

    async def stage(self) -> str:
        """What `start` is doing, in a few words; then `ready`, or `failed: ` and the reason."""
        return self._driver.stage

    async def address(self, client_node: str | None = None) -> DriverAddress:
        """Where clients connect. TCP is opened when a client lives on another node."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        if self._driver.link is not None and client_node not in (None, node):
            self._driver.link.listen_tcp(ray.util.get_node_ip_address())
        return self._driver.address(node)

    async def describe(self) -> EngineDescription:
        config, executor = self._driver.config, self._driver.executor
        if config is None or executor is None:
            raise EngineError(f"the engine is not ready: {self._driver.stage}", code="engine_not_ready")
        return EngineDescription(
            config=config.model_dump_json(),
            served_model_name=config.served_model_name,
            num_blocks=executor.num_blocks,
            driver=worker_place(),
            workers=tuple(executor.places),  # type: ignore[attr-defined]  # a WorkerGroup, see __init__
            standby_is_ready=executor.standby_is_ready,  # type: ignore[attr-defined]
        )

    async def kill_worker(self, rank: int) -> KilledWorker:
        """For fault injection: `kill_rank`."""
        return await asyncio.to_thread(kill_rank, self._driver.executor, rank)  # type: ignore[arg-type]  # see __init__

    async def wait_failed(self) -> str:
        """Returns the reason once the engine has failed; not before."""
        await self._failed.wait()
        return self._driver.failure or ""

    async def shutdown(self) -> WorkerPlace:
        """Ends the engine; says which process is left to be killed."""
        await asyncio.to_thread(self._driver.close)
        return worker_place()
