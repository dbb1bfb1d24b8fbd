"""A worker process: loads its shard, joins its peers, then computes plans until the driver closes the channel or a peer
is lost. Then it waits, weights in hand, to be joined to new peers.

torch is imported inside functions: the driver imports this module to make the actors and never needs torch.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from rayllm.config import ResolvedConfig
from rayllm.executor.channel import Channel
from rayllm.executor.pipeline import StepRunner
from rayllm.executor.plan_server import serve_plans
from rayllm.executor.process_group import ProcessGroup
from rayllm.observability.trace import open_tracer
from rayllm.weights.progress import LoadProgress

if TYPE_CHECKING:
    from rayllm.distributed.all_reduce import CustomAllReduce
    from rayllm.distributed.groups import TensorParallel
    from rayllm.distributed.links import Link

_PREPARE_NICENESS = 10

RunnerFactory = Callable[[ResolvedConfig, "TensorParallel"], StepRunner]


class WorkerLoop:
    """One rank's life, without Ray: `load`, then for each group of peers `open_store` (rank 0), `join`, in the
    first one `count_blocks`, `start`, `serve`, in this order.

    A standby has no rank until it takes one; it may `prepare` before.
    """

    def __init__(self, config: ResolvedConfig, rank: int | None, runner_factory: RunnerFactory | None = None):
        self._config = config
        self.rank = rank
        self.progress = LoadProgress(config.engine.layout.num_ranks)
        self._runner_factory = runner_factory or partial(load_runner, progress=self.progress)
        self._before_abort: list[Callable[[], None]] = []
        self._group = ProcessGroup(config.device, config.engine.layout.num_ranks, self._before_abort)
        self._all_reduce: CustomAllReduce | None = None
        self._gpu_index = 0
        self._runner: StepRunner | None = None
        self._spare: dict[int, StepRunner] = {}
        self._tracer = open_tracer(config.engine.otlp_traces_endpoint, "worker")

    def prepare(self) -> None:
        """Imports what a rank needs; with `standby="weights"` also loads every rank's shard, as nobody knows which one
        will be lost. Runs at a lower priority than the ranks at work.
        """
        with ThreadPoolExecutor(1, initializer=_lower_priority) as pool:  # for good, but of that thread alone
            pool.submit(self._prepare).result()

    def _prepare(self) -> None:
        import rayllm.runner.runner  # noqa: F401

        if self._config.engine.standby == "weights":
            self._spare = {rank: self._make_runner(rank) for rank in self._config.engine.layout.ranks}

    def take(self, rank: int) -> None:
        """Becomes `rank`, in place of one that was lost."""
        self.rank = rank

    def show_gpus(self, node_gpus: Sequence[str], own_gpu: str) -> None:
        """Before CUDA starts: of its node this process sees `node_gpus`, those of all the engine's ranks there, and
        computes on `own_gpu`. Ray shows it its own alone, but ranks reach into each other's memory only between GPUs
        that both see, under different numbers."""
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(node_gpus)
        self._gpu_index = node_gpus.index(own_gpu)

    def load(self) -> None:
        """Loads the weights. Raises whatever the runner raises for a checkpoint it cannot load."""
        assert self.rank is not None, "a standby takes a rank first"
        self._runner = self._spare.pop(self.rank, None) or self._make_runner(self.rank)
        self._spare.clear()

    def _make_runner(self, rank: int) -> StepRunner:
        import torch

        from rayllm.distributed.groups import TensorParallel

        torch.set_num_threads(self._config.num_threads)
        if self._config.device == "cuda":
            torch.cuda.set_device(self._gpu_index)
            self._all_reduce = self._make_all_reduce(rank)
        # No group: collectives use the process's default one, which is another one after a peer was replaced.
        layout = self._config.engine.layout
        tp = TensorParallel(
            layout.tp_rank(rank),
            layout.tp,
            expert_parallel=layout.expert_parallel,
            custom=self._all_reduce,
            before_abort=self._before_abort,
        )
        return self._runner_factory(self._config, tp)

    def _make_all_reduce(self, rank: int) -> CustomAllReduce | None:
        import torch

        from rayllm.distributed.all_reduce import CustomAllReduce, size_limits

        layout = self._config.engine.layout
        if layout.tp == 1 or layout.num_ranks > layout.tp:  # the ranks of a stage have no store of their own
            return None
        device = torch.device("cuda", self._gpu_index)
        limits, disabled = size_limits(device, layout.tp), self._config.engine.disable_custom_all_reduce
        made = CustomAllReduce(layout.tp_rank(rank), layout.tp, device, limits, disabled=disabled)
        self._before_abort.append(made.close)
        return made

    def open_store(self, host: str) -> tuple[str, int]:
        """See `ProcessGroup`."""
        return self._group.open_store(host)

    def join(self, store: tuple[str, int], one_node: bool) -> None:
        """See `ProcessGroup`. `one_node`: all ranks are on the same one."""
        assert self.rank is not None
        self._group.join(self.rank, store)
        if self._all_reduce is not None:
            self._all_reduce.connect(self._group.exchange(self.rank), one_node=one_node)

    def check_links(self) -> list[Link]:
        """What this rank sees of its links to its peers; see `rayllm.distributed.fabric`."""
        import torch

        from rayllm.distributed.fabric import check_links, swap_in_group

        assert self.rank is not None
        device = torch.device("cuda", self._gpu_index) if self._config.device == "cuda" else torch.device("cpu")
        return check_links(self._group.exchange(self.rank), swap_in_group, device)

    def abort(self) -> None:
        """See `ProcessGroup`; called from another thread."""
        if self._all_reduce is not None:
            self._all_reduce.abort()
        self._group.abort()

    def leave(self) -> None:
        """See `ProcessGroup`."""
        self._group.leave()

    def count_blocks(self) -> int:
        """The KV blocks there is room for. All ranks are asked together, once they have joined: they may compute a
        step. Raises `ConfigError` where there is too little room."""
        return self._loaded().num_blocks_available()

    def start(self, num_blocks: int) -> None:
        """Allocates the KV pool, when that is not done, forgets all rows, and computes a little with the peers."""
        runner = self._loaded()
        runner.start(num_blocks)
        runner.warm_up()

    def serve(self, channel: Channel) -> str | None:
        """Computes plans until the driver closes the channel (None) or a step fails (the reason, which the driver gets
        too)."""
        assert self.rank is not None
        try:
            answers = self.rank == self._config.engine.layout.answering_rank
            return serve_plans(self._loaded(), self.rank, channel, self._tracer, answers=answers)
        finally:
            self.leave()

    def _loaded(self) -> StepRunner:
        assert self._runner is not None, "load() comes first"
        return self._runner


def load_runner(config: ResolvedConfig, tp: TensorParallel, progress: LoadProgress) -> StepRunner:
    """The real runner; it brings torch and the model."""
    from rayllm.runner.runner import Runner

    return Runner(config, tp, progress=progress)


def _lower_priority() -> None:
    """Gives this thread a lower priority than other processes, for good. Only Linux has priorities of threads."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _PREPARE_NICENESS)
