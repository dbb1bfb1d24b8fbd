"""The group of ranks that compute together: how it forms, how a wait in it is ended, how it is left.

torch is imported inside functions: the driver imports this module and never needs torch.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rayllm.executor.channel import listen_tcp

if TYPE_CHECKING:
    from rayllm.distributed.exchange import Exchange

COLLECTIVE_TIMEOUT_S = {"cpu": 10.0, "cuda": 60.0}
"""The second line against hangs, behind the driver's watch over steps. Peers join when all have loaded their weights;
on a GPU their first steps may compile kernels, each at its own pace.
"""
ABORT_TIMEOUT_S = 10.0
"""For NCCL to give its communicator up once its kernels were told to end. The survivor that was observed was free after
0.15 s (NVIDIA-NeMo/RL #3591)."""
CUDA_ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
"""Must be set before torch is imported. With torch's defaults its watchdog ends the process of a survivor whose peer
died, and the survivor's weights with it; the driver watches over steps. By the last one a library that asks whether
there is a GPU does not start CUDA, so that a standby can still be shown its GPUs.

Communicators stay blocking. A nonblocking one could be aborted while it forms, but NCCL then starts a thread for every
single collective (`ncclGroupEndInternal` in its src/group.cc). A rank that stays stuck in forming one is replaced.
"""


class ProcessGroup:
    """This process's membership of torch's default process group. Every group of peers has a store of its own: a late
    message of a group that failed cannot reach the next.

    `before_abort` is called, in `leave`, by the thread that computes: who holds the communicator lets it go. NCCL's
    abort ends the kernels at once, but itself only when no CUDA graph has the communicator any more.
    """

    def __init__(self, device: str, size: int, before_abort: Sequence[Callable[[], None]] = ()):
        self._device = device
        self._size = size
        self._before_abort = before_abort
        self._store: Any = None
        self._abort_lock = threading.Lock()
        self._aborting: threading.Thread | None = None
        self._is_stuck = False

    @property
    def store(self) -> Any:
        """The rendezvous store of the group that was joined (`torch.distributed.Store`)."""
        assert self._store is not None, "no group was joined"
        return self._store

    def exchange(self, rank: int) -> Exchange:
        """What the ranks of the group that was joined tell each other through its store; `rank` is this process's."""
        from rayllm.distributed.exchange import Exchange

        return Exchange(self.store, rank, self._size)

    def open_store(self, host: str) -> tuple[str, int]:
        """Opens the rendezvous store of a new process group on this node, listening on `host` alone."""
        import torch.distributed as dist

        self._refuse_if_stuck()
        self.leave()
        sock = listen_tcp(host)
        port = sock.getsockname()[1]
        fd = sock.detach()  # the store itself would listen on all interfaces
        timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S[self._device])
        self._store = dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=fd
        )
        return host, port

    def join(self, rank: int, store: tuple[str, int]) -> None:
        """Forms the group with all who are given the same store; rank 0 opened it."""
        import torch.distributed as dist

        timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S[self._device])
        self._refuse_if_stuck()
        if rank != 0:
            self.leave()
            host, port = store
            self._store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
        try:
            self._form(rank, timeout)
        except BaseException:
            from rayllm.torch_private import forget_group_count

            forget_group_count()
            raise

    def _form(self, rank: int, timeout: timedelta) -> None:
        import torch
        import torch.distributed as dist

        arguments: dict[str, Any] = {"store": self._store, "rank": rank, "world_size": self._size, "timeout": timeout}
        if self._device == "cpu":
            dist.init_process_group("gloo", **arguments)
            return
        device = torch.device("cuda", torch.cuda.current_device())

        def form() -> None:
            torch.cuda.set_device(device)
            # By `device_id` the communicator forms here, not in the first collective.
            dist.init_process_group("nccl", device_id=device, **arguments)

        self._form_in_time(form, timeout)

    def _form_in_time(self, form: Callable[[], None], timeout: timedelta) -> None:
        """NCCL itself would wait for a peer that it cannot reach without a limit."""
        forming: Future[None] = Future()

        def run() -> None:
            try:
                form()
                forming.set_result(None)
            except BaseException as error:
                forming.set_exception(error)

        threading.Thread(target=run, name="nccl-join", daemon=True).start()
        limit_s = timeout.total_seconds()
        try:
            forming.result(limit_s)
        except FutureTimeoutError:
            if forming.done():  # what was raised is the store's own
                raise
            self._is_stuck = True
            raise TimeoutError(
                f"NCCL did not connect {self._size} ranks within {limit_s:g} s: look at the links between them, at "
                "firewalls and at NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO shows what it waits for"
            ) from None

    def abort(self) -> None:
        """Makes a collective, or a `join`, that another thread of this process waits in fail. On a GPU it returns at
        once: the abort goes on until the other thread has left the group."""
        if self._device == "cuda":
            self._begin_abort()
        else:
            from rayllm.torch_private import abort_collectives

            abort_collectives()
        if self._store is not None:
            cut_connections(self._store.port)

    def leave(self) -> None:
        """Out of the process group, if in one: peers that wait for this rank in a step fail at once. Raises
        `RuntimeError` where NCCL does not give its communicator up: this process cannot join another group then."""
        if "torch" not in sys.modules:
            return
        import torch.distributed as dist

        if self._device == "cuda":
            self._finish_abort()
        elif dist.is_initialized():
            with contextlib.suppress(Exception):  # a broken group may fail to shut down
                dist.destroy_process_group()
        self._store = None

    def _refuse_if_stuck(self) -> None:
        if self._is_stuck:
            raise RuntimeError("a thread of this process still waits in NCCL: it cannot join another group")

    def _begin_abort(self) -> threading.Thread | None:
        """The thread in which the group is aborted; None where there is none to abort."""
        import torch.distributed as dist

        from rayllm.torch_private import abort_collectives

        with self._abort_lock:
            if self._aborting is None and dist.is_initialized():
                self._aborting = threading.Thread(target=abort_collectives, name="nccl-abort", daemon=True)
                self._aborting.start()
            return self._aborting

    def _finish_abort(self) -> None:
        """A destroyed group would wait for its peers; one that is aborted does not."""
        aborting = self._begin_abort()
        if aborting is None:
            return
        for release in self._before_abort:
            release()
        aborting.join(ABORT_TIMEOUT_S)
        if aborting.is_alive():
            raise RuntimeError(f"NCCL did not end its communicator within {ABORT_TIMEOUT_S:g} s of the abort")
        with self._abort_lock:
            self._aborting = None


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
