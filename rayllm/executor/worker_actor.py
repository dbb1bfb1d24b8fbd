"""The Ray actor of a worker process."""

from __future__ import annotations

import os
from collections.abc import Mapping

from rayllm.config import ResolvedConfig
from rayllm.distributed.links import Link
from rayllm.executor.channel import Address, connect
from rayllm.executor.worker import RunnerFactory, WorkerLoop
from rayllm.executor.worker_process import WorkerPlace, worker_place
from rayllm.observability.logs import setup_logging


class WorkerActor:
    """The Ray actor round a `WorkerLoop`. Its calls are of the lifecycle; steps go over the socket inside
    `run`. Those of the concurrency group `health` are answered while others run.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        rank: int | None,
        environment: Mapping[str, str],
        runner_factory: RunnerFactory | None = None,
    ):
        os.environ.update(environment)
        self._config = config
        self._loop = WorkerLoop(config, rank, runner_factory)
        self._name_logs(rank)

    def alive(self) -> None:
        """Answered in `health`."""

    def progress(self) -> tuple[int, int]:
        """Bytes of weights read, and of how many. Called in `health`."""
        return self._loop.progress.numbers()

    def abort(self) -> None:
        """Called in `health`."""
        self._loop.abort()

    def place(self) -> WorkerPlace:
        return worker_place()

    def prepare(self) -> None:
        self._loop.prepare()

    def take(self, rank: int) -> None:
        self._name_logs(rank)
        self._loop.take(rank)

    def show_gpus(self, node_gpus: tuple[str, ...], own_gpu: str) -> None:
        self._loop.show_gpus(node_gpus, own_gpu)

    def load(self) -> None:
        self._loop.load()

    def _name_logs(self, rank: int | None) -> None:
        process = "worker standby" if rank is None else f"worker {rank}"
        setup_logging(self._config.engine.log_format, process=process, file=self._config.engine.log_file)

    def open_store(self, host: str) -> tuple[str, int]:
        return self._loop.open_store(host)

    def join(self, store: tuple[str, int], one_node: bool) -> None:
        self._loop.join(store, one_node)

    def check_links(self) -> list[Link]:
        return self._loop.check_links()

    def count_blocks(self) -> int:
        return self._loop.count_blocks()

    def start(self, num_blocks: int) -> None:
        self._loop.start(num_blocks)

    def run(self, driver: Address, token: str) -> str | None:
        """Connects to the driver and serves its plans; returns only when that is over."""
        channel = connect(driver, token, str(self._loop.rank), "the driver")
        try:
            return self._loop.serve(channel)
        finally:
            channel.close()
