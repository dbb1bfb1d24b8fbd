"""A worker process: loads its shard, joins its peers, then does what plans say until the driver hangs up or a peer
is lost. Then it waits, weights in hand, to be joined to new peers.

torch is imported inside functions: the driver imports this module to make the actors and never needs torch.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from rayllm.config import ResolvedConfig
from rayllm.errors import without_paths
from rayllm.executor.channel import Address, Channel, PeerGoneError, connect, listen_tcp
from rayllm.executor.inproc import StepRunner, one_line
from rayllm.messages import StepPlan, WorkerFailure
from rayllm.observability.logs import setup_logging
from rayllm.observability.trace import Tracer, open_tracer

if TYPE_CHECKING:
    from rayllm.distributed.groups import TensorParallel

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
COLLECTIVE_TIMEOUT_S = {"cpu": 10.0, "cuda": 60.0}
"""The second line against hangs, behind the driver's watch over steps. Peers join when all have loaded their weights;
on a GPU their first steps may compile kernels, each at its own pace.
"""
END_TIMEOUT_S = 10.0
_MODEST_NICENESS = 10
_MAX_ERROR_CHARACTERS = 300

RunnerFactory = Callable[[ResolvedConfig, "TensorParallel"], StepRunner]


@dataclass(frozen=True)
class WorkerPlace:
    """Where a worker process lives."""

    pid: int
    node_id: str
    host: str
    devices: tuple[str, ...]
    """What Ray gave it: `cuda:` and the GPU's id on its node, or `cpu`."""
    log_path: str = ""
    """The file on its node that its errors are written to."""


class WorkerLoop:
    """One rank's life, without Ray: `load`, then for each group of peers `open_store` (rank 0), `join`, `start`,
    `serve`, in this order.

    A standby has no rank until it takes one; it may `prepare` before.
    """

    def __init__(self, config: ResolvedConfig, rank: int | None, runner_factory: RunnerFactory | None = None):
        self._config = config
        self.rank = rank
        self._runner_factory = runner_factory or load_runner
        self._store: Any = None
        self._runner: StepRunner | None = None
        self._spare: dict[int, StepRunner] = {}
        self._tracer = open_tracer(config.engine.otlp_traces_endpoint, "worker")

    def prepare(self) -> None:
        """Imports what a rank needs; with `standby="weights"` also loads every rank's shard, as nobody knows which one
        will be lost. Takes only what the ranks at work leave of the cores.
        """
        with ThreadPoolExecutor(1, initializer=_be_modest) as pool:  # a thread can be made modest, and goes after it
            pool.submit(self._prepare).result()

    def _prepare(self) -> None:
        import rayllm.runner.runner  # noqa: F401

        size = self._config.engine.tensor_parallel_size
        if self._config.engine.standby == "weights":
            self._spare = {rank: self._make_runner(rank) for rank in range(size)}

    def take(self, rank: int, devices: Sequence[str]) -> None:
        """Becomes `rank`, on the devices of the one it replaces; CUDA was not touched before."""
        self.rank = rank
        gpus = [device.removeprefix("cuda:") for device in devices if device.startswith("cuda:")]
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)

    def load(self) -> int:
        """Loads the weights; returns the KV blocks there is room for.

        Raises whatever the runner raises for a checkpoint it cannot load.
        """
        assert self.rank is not None, "a standby takes a rank first"
        self._runner = self._spare.pop(self.rank, None) or self._make_runner(self.rank)
        self._spare.clear()
        return self._runner.num_blocks_available()

    def _make_runner(self, rank: int) -> StepRunner:
        import torch

        from rayllm.distributed.groups import TensorParallel

        torch.set_num_threads(self._config.num_threads)
        if self._config.device == "cuda":
            torch.cuda.set_device(0)  # Ray shows each worker its own GPU only
        # No group: collectives use the process's default one, which is another one after a peer was replaced.
        return self._runner_factory(self._config, TensorParallel(rank, self._config.engine.tensor_parallel_size))

    def open_store(self, host: str) -> tuple[str, int]:
        """Opens the rendezvous store of a new process group on this node, listening on `host` alone."""
        import torch.distributed as dist

        self.leave()
        sock = listen_tcp(host)
        port = sock.getsockname()[1]
        fd = sock.detach()  # the store itself would listen on all interfaces
        self._store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=fd)
        return host, port

    def join(self, store: tuple[str, int]) -> None:
        """Forms the process group with all who are given the same store."""
        import torch.distributed as dist

        device, rank, size = self._config.device, self.rank, self._config.engine.tensor_parallel_size
        timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S[device])
        if rank != 0:
            self.leave()
            host, port = store
            self._store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
        assert rank is not None
        backend = "nccl" if device == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, store=self._store, rank=rank, world_size=size, timeout=timeout)
        except BaseException:
            # A group that failed to form still counts, and peers find each other under the count.
            dist.distributed_c10d._world.group_count = 0
            raise

    def abort(self) -> None:
        """Makes a collective, or a `join`, that another thread of this process waits in fail."""
        abort_collectives()
        if self._store is not None:
            cut_connections(self._store.port)

    def leave(self) -> None:
        """Out of the process group, if in one: peers that wait for this rank in a step fail at once."""
        if "torch" not in sys.modules:
            return
        import torch.distributed as dist

        if dist.is_initialized():
            with contextlib.suppress(Exception):  # a broken group may fail to say goodbye
                dist.destroy_process_group()
        self._store = None

    def start(self, num_blocks: int) -> None:
        """Allocates the KV pool, when that is not done, forgets all rows, and computes a little with the peers."""
        runner = self._loaded()
        runner.start(num_blocks)
        runner.warm_up()

    def serve(self, channel: Channel) -> str | None:
        """Does plans until the driver hangs up (None) or a step fails (the reason, which the driver is told too)."""
        assert self.rank is not None
        try:
            return serve_plans(self._loaded(), self.rank, channel, self._tracer)
        finally:
            self.leave()

    def _loaded(self) -> StepRunner:
        assert self._runner is not None, "load() comes first"
        return self._runner


def serve_plans(runner: StepRunner, rank: int, channel: Channel, tracer: Tracer | None = None) -> str | None:
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
            started_at = time.monotonic()
            result = runner.execute(plan)
            if tracer is not None:
                trace_starts(tracer, plan, rank, started_at)
            if rank == 0:
                channel.send(msgspec.structs.replace(result, waited_s=waited_s))
        except PeerGoneError:
            return None
        except Exception as error:
            reason = one_line(error)
            log.exception("a step failed")
            with contextlib.suppress(PeerGoneError):
                channel.send(WorkerFailure(rank, epoch, reason))
            return reason
        idle_since = time.perf_counter()


def trace_starts(tracer: Tracer, plan: StepPlan, rank: int, started_at: float) -> None:
    """A span for each traced row that begins with the plan, which has been computed since `started_at`."""
    now = time.monotonic()
    for row in plan.new_rows:
        if row.traceparent:
            attributes = {"rayllm.rank": rank, "rayllm.step": plan.step, "rayllm.choice": row.choice}
            tracer.record("execute", row.traceparent, started_at, now, attributes)


def load_runner(config: ResolvedConfig, tp: TensorParallel) -> StepRunner:
    """The real runner; it brings torch and the model."""
    from rayllm.runner.runner import Runner

    return Runner(config, tp)


def abort_collectives() -> None:
    """Makes a collective that another thread of this process waits in fail."""
    import torch.distributed.distributed_c10d as c10d

    with contextlib.suppress(Exception):  # there may be no group
        c10d._abort_process_group()


def cut_connections(port: int) -> None:
    """Ends this process's TCP connections from and to a port of the rendezvous store: who waits there for a peer that
    has died would wait until its time limit. The store's own interface has no way to end a wait."""
    for entry in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.stat(int(entry)).st_mode):
                with socket.socket(fileno=os.dup(int(entry))) as connection:
                    _cut(connection, port)


def _cut(connection: socket.socket, port: int) -> None:
    is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM
    if is_tcp and port in (connection.getsockname()[1], connection.getpeername()[1]):
        connection.shutdown(socket.SHUT_RDWR)


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

    def abort(self) -> None:
        """Called in `health`."""
        self._loop.abort()

    def place(self) -> WorkerPlace:
        return worker_place()

    def prepare(self) -> None:
        self._loop.prepare()

    def take(self, rank: int, devices: tuple[str, ...]) -> None:
        self._name_logs(rank)
        self._loop.take(rank, devices)

    def load(self) -> int:
        return self._loop.load()

    def _name_logs(self, rank: int | None) -> None:
        process = "worker standby" if rank is None else f"worker {rank}"
        setup_logging(self._config.engine.log_format, process=process, file=self._config.engine.log_file)

    def open_store(self, host: str) -> tuple[str, int]:
        return self._loop.open_store(host)

    def join(self, store: tuple[str, int]) -> None:
        self._loop.join(store)

    def start(self, num_blocks: int) -> None:
        self._loop.start(num_blocks)

    def run(self, driver: Address, token: str) -> str | None:
        """Connects to the driver and serves its plans; returns only when that is over."""
        channel = connect(driver, token, str(self._loop.rank), "the driver")
        try:
            return self._loop.serve(channel)
        finally:
            channel.close()


def _be_modest() -> None:
    """Lets other processes go before this thread, for good. Only Linux has such a figure for each thread."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _MODEST_NICENESS)


def worker_place() -> WorkerPlace:
    """Where this process lives, as Ray sees it."""
    import ray

    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", [])
    devices = tuple(f"cuda:{gpu}" for gpu in gpus) or ("cpu",)
    log_path = ""
    with contextlib.suppress(OSError):
        log_path = os.readlink("/proc/self/fd/2")
    return WorkerPlace(os.getpid(), context.get_node_id(), ray.util.get_node_ip_address(), devices, log_path)


def await_ends(places: Iterable[WorkerPlace]) -> None:
    """Waits until the processes, which live on this node and were told to end, are gone and their memory with them."""
    alive = {place.pid for place in places}
    deadline = time.monotonic() + END_TIMEOUT_S
    while alive := {pid for pid in alive if _is_alive(pid)}:
        if time.monotonic() > deadline:
            log.warning("processes %s did not end within %g s", sorted(alive), END_TIMEOUT_S)
            return
        time.sleep(0.01)


def kill_process(place: WorkerPlace) -> bool:
    """Ends a Ray worker process of this node that may not listen to Ray; False where it is gone already."""
    with contextlib.suppress(OSError):
        if b"ray::" in Path(f"/proc/{place.pid}/cmdline").read_bytes():  # the number may be another's by now
            os.kill(place.pid, signal.SIGKILL)
            return True
    return False


def is_stopped(place: WorkerPlace) -> bool:
    """Whether a process of this node is seen to be stopped by a signal, or gone."""
    try:
        return Path(f"/proc/{place.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "TtZX"
    except OSError:
        return Path("/proc/self/stat").exists()  # without /proc nothing is known


def last_error(log: str) -> str:
    """What a log says last of what went wrong, in one line: no traceback, no file paths, none of Ray's marks."""
    left_out = (" ", "\t", "Traceback", ":actor_name:", ":task_name:", ":job_id:")
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith(left_out)]
    errors = [line for line in lines if re.search(r"[Ee]rror|[Ee]xception|[Kk]illed|[Ff]atal|out of memory", line)]
    return without_paths(" ".join((errors or lines or [""])[-1].split()))[:_MAX_ERROR_CHARACTERS]


def log_tail(place: WorkerPlace, num_bytes: int = 1000) -> str:
    """The last lines that a process of this node wrote; empty where there are none to be read."""
    try:
        with open(place.log_path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - num_bytes))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""


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
