"""A worker process: joins its peers, loads its shard, then does what plans say until the driver hangs up.

torch is imported inside functions: the driver imports this module to make the actors and never needs torch.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from rayllm.config import ResolvedConfig
from rayllm.executor.channel import Address, Channel, PeerGoneError, connect, listen_tcp
from rayllm.executor.inproc import StepRunner, one_line
from rayllm.messages import StepPlan, WorkerFailure

if TYPE_CHECKING:
    from rayllm.distributed.groups import TensorParallel

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
COLLECTIVE_TIMEOUT_S = 300.0
"""Generous: the first collectives wait for the slowest rank's weights. Hangs in a step are the driver's to
notice.
"""
END_TIMEOUT_S = 10.0

RunnerFactory = Callable[[ResolvedConfig, "TensorParallel"], StepRunner]


@dataclass(frozen=True)
class WorkerPlace:
    """Where a worker process lives."""

    pid: int
    node_id: str
    host: str
    devices: tuple[str, ...]
    """What Ray gave it: `cuda:` and the GPU's id on its node, or `cpu`."""


class WorkerLoop:
    """One rank's life, without Ray: `open_store` (rank 0), `load`, `start`, `serve`, in this order."""

    def __init__(self, config: ResolvedConfig, rank: int, runner_factory: RunnerFactory | None = None):
        self._config = config
        self._rank = rank
        self._runner_factory = runner_factory or load_runner
        self._store: Any = None
        self._runner: StepRunner | None = None

    def open_store(self, host: str) -> Address:
        """Opens the rendezvous store of the process group on this node, listening on `host` alone."""
        import torch.distributed as dist

        sock = listen_tcp(host)
        port = sock.getsockname()[1]
        fd = sock.detach()  # the store itself would listen on all interfaces
        self._store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=fd)
        return host, port

    def load(self, store: Address | None) -> int:
        """Joins the process group (no store: a single rank), loads the weights; returns the KV blocks there
        is room for.

        Raises whatever the runner raises for a checkpoint it cannot load.
        """
        import torch

        size = self._config.engine.tensor_parallel_size
        torch.set_num_threads(self._config.num_threads)
        if self._config.device == "cuda":
            torch.cuda.set_device(0)  # Ray shows each worker its own GPU only
        tp = _join(self._rank, size, self._config.device, self._store, store)
        self._runner = self._runner_factory(self._config, tp)
        return self._runner.num_blocks_available()

    def start(self, num_blocks: int) -> None:
        """Allocates the KV pool and warms up."""
        runner = self._loaded()
        runner.start(num_blocks)
        runner.warm_up()

    def serve(self, channel: Channel) -> str | None:
        """Does plans until the driver hangs up (None) or a step fails (the reason, which the driver is told too)."""
        return serve_plans(self._loaded(), self._rank, channel)

    def _loaded(self) -> StepRunner:
        assert self._runner is not None, "load() comes first"
        return self._runner


def serve_plans(runner: StepRunner, rank: int, channel: Channel) -> str | None:
    """Does plans until the driver hangs up (None) or a step fails (the reason, which the driver is told too)."""
    decoder = msgspec.msgpack.Decoder(StepPlan)
    gc.collect()
    gc.freeze()  # weights and modules are not garbage: the collector need not look at them during a step
    epoch, idle_since = 0, time.perf_counter()
    while True:
        try:
            frame = channel.receive()
        except PeerGoneError:
            return None
        waited_s = time.perf_counter() - idle_since
        try:
            plan = decoder.decode(frame)
            epoch = plan.epoch
            result = runner.execute(plan)
            if rank == 0:
                channel.send(msgspec.structs.replace(result, waited_s=waited_s))
        except PeerGoneError:
            return None
        except Exception as error:
            reason = one_line(error)
            with contextlib.suppress(PeerGoneError):
                channel.send(WorkerFailure(rank, epoch, reason))
            return reason
        idle_since = time.perf_counter()


def load_runner(config: ResolvedConfig, tp: TensorParallel) -> StepRunner:
    """The real runner; it brings torch and the model."""
    from rayllm.runner.runner import Runner

    return Runner(config, tp)


def _join(rank: int, size: int, device: str, own_store: Any, store: Address | None) -> TensorParallel:
    import torch.distributed as dist

    from rayllm.distributed.groups import TensorParallel

    if size == 1:
        return TensorParallel()
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    if own_store is None:
        assert isinstance(store, tuple), "ranks above 0 need the store's address"
        own_store = dist.TCPStore(*store, is_master=False, wait_for_workers=False, timeout=timeout)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=own_store, rank=rank, world_size=size, timeout=timeout
    )
    return TensorParallel(rank, size, dist.group.WORLD)


class WorkerActor:
    """The Ray actor round a `WorkerLoop`. Its calls are of the lifecycle; steps go over the socket inside
    `run`.
    """

    def __init__(self, config: ResolvedConfig, rank: int, runner_factory: RunnerFactory | None = None):
        self._rank = rank
        self._loop = WorkerLoop(config, rank, runner_factory)

    def place(self) -> WorkerPlace:
        return worker_place()

    def open_store(self, host: str) -> Address:
        return self._loop.open_store(host)

    def load(self, store: Address | None) -> int:
        return self._loop.load(store)

    def start(self, num_blocks: int) -> None:
        self._loop.start(num_blocks)

    def run(self, driver: Address, token: str) -> str | None:
        """Connects to the driver and serves its plans; returns only when that is over."""
        channel = connect(driver, token, str(self._rank), "the driver")
        try:
            return self._loop.serve(channel)
        finally:
            channel.close()


def worker_place() -> WorkerPlace:
    """Where this process lives, as Ray sees it."""
    import ray

    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", [])
    devices = tuple(f"cuda:{gpu}" for gpu in gpus) or ("cpu",)
    return WorkerPlace(os.getpid(), context.get_node_id(), ray.util.get_node_ip_address(), devices)


def await_ends(places: Iterable[WorkerPlace]) -> None:
    """Waits until the processes, which live on this node and were told to end, are gone and their memory with them."""
    alive = {place.pid for place in places}
    deadline = time.monotonic() + END_TIMEOUT_S
    while alive := {pid for pid in alive if _is_alive(pid)}:
        if time.monotonic() > deadline:
            log.warning("processes %s did not end within %g s", sorted(alive), END_TIMEOUT_S)
            return
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def death_reason(error: Exception) -> str:
    """Ray's account of an actor's death, in one line without its general advice."""
    text = " ".join(str(error).split())
    detail = re.search(r"Worker exit type: (\S+) Worker exit detail: (.*?)(?: Some common causes.*)?$", text)
    if detail:
        return f"its process died ({detail[1]}: {detail[2].rstrip('.')})"
    cause = re.search(r"(The actor (?:is dead because|died because).*)$", text)
    return cause[1] if cause else one_line(error)


def worker_environment(config: ResolvedConfig, single_node: bool) -> dict[str, str]:
    """Variables that a worker process needs before torch is imported."""
    variables = {"OMP_NUM_THREADS": str(config.num_threads)}
    if single_node:
        variables |= {
            "GLOO_SOCKET_IFNAME": _loopback_interface(),
            "NCCL_SOCKET_IFNAME": _loopback_interface(),
        }
    return variables


def _loopback_interface() -> str:
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")
