"""The group of ranks that compute together: how it forms, how a wait in it is ended, how it is left.

torch is imported inside functions: the driver imports this module and never needs torch.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys
from datetime import timedelta
from typing import Any

from rayllm.executor.channel import listen_tcp

COLLECTIVE_TIMEOUT_S = {"cpu": 10.0, "cuda": 60.0}
"""The second line against hangs, behind the driver's watch over steps. Peers join when all have loaded their weights;
on a GPU their first steps may compile kernels, each at its own pace.
"""


class ProcessGroup:
    """This process's membership of torch's default process group. Every group of peers has a store of its own: a late
    message of a group that failed cannot reach the next."""

    def __init__(self, device: str, size: int):
        self._device = device
        self._size = size
        self._store: Any = None

    def open_store(self, host: str) -> tuple[str, int]:
        """Opens the rendezvous store of a new process group on this node, listening on `host` alone."""
        import torch.distributed as dist

        self.leave()
        sock = listen_tcp(host)
        port = sock.getsockname()[1]
        fd = sock.detach()  # the store itself would listen on all interfaces
        self._store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=fd)
        return host, port

    def join(self, rank: int, store: tuple[str, int]) -> None:
        """Forms the group with all who are given the same store; rank 0 opened it."""
        import torch.distributed as dist

        timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S[self._device])
        if rank != 0:
            self.leave()
            host, port = store
            self._store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
        backend = "nccl" if self._device == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, store=self._store, rank=rank, world_size=self._size, timeout=timeout)
        except BaseException:
            from rayllm.torch_private import forget_group_count

            forget_group_count()
            raise

    def abort(self) -> None:
        """Makes a collective, or a `join`, that another thread of this process waits in fail."""
        from rayllm.torch_private import abort_collectives

        abort_collectives()
        if self._store is not None:
            cut_connections(self._store.port)

    def leave(self) -> None:
        """Out of the process group, if in one: peers that wait for this rank in a step fail at once."""
        if "torch" not in sys.modules:
            return
        import torch.distributed as dist

        if dist.is_initialized():
            with contextlib.suppress(Exception):  # a broken group may fail to shut down
                dist.destroy_process_group()
        self._store = None


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
