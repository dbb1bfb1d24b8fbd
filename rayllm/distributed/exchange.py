"""What ranks of a group tell each other while they form it: texts by the group's store, file descriptors by sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from typing import Any

_TIMEOUT_S = 10.0


class Exchange:
    """One rank's side, for ranks that all call the same methods in the same order with the same keys. `store` is a
    `torch.distributed.Store` that belongs to this group alone."""

    def __init__(self, store: Any, rank: int, size: int):
        self._store, self.rank, self.size = store, rank, size

    def gather(self, key: str, value: str) -> list[str]:
        """Every rank's value, in order of rank."""
        self._store.set(f"{key}/{self.rank}", value)
        return [self._store.get(f"{key}/{rank}").decode() for rank in range(self.size)]

    def share_fd(self, key: str, fd: int) -> dict[int, int]:
        """Gives this rank's file descriptor to every other rank of this node, and returns a descriptor for theirs, by
        rank."""
        # A folder that no other user may enter: a descriptor opens the memory to whoever holds it.
        with tempfile.TemporaryDirectory(prefix="rayllm-") as folder, socket.socket(socket.AF_UNIX) as listener:
            listener.settimeout(_TIMEOUT_S)
            path = os.path.join(folder, "socket")
            with contextlib.suppress(OSError):  # a path that is too long: peers learn it by an empty one
                listener.bind(path)
                listener.listen(self.size)
            paths = self.gather(key, listener.getsockname())
            if "" in paths:
                raise OSError(f"rank {paths.index('')} cannot listen on a socket in its folder for temporary files")
            try:
                for rank in range(self.size):
                    if rank != self.rank:
                        self._send(paths[rank], fd)
                return dict(_received(listener) for _ in range(self.size - 1))
            finally:
                self.gather(f"{key}/received", "")  # the folder must be there until all have connected

    def _send(self, path: str, fd: int) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_TIMEOUT_S)
            connection.connect(path)
            socket.send_fds(connection, [str(self.rank).encode()], [fd])


def _received(listener: socket.socket) -> tuple[int, int]:
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(_TIMEOUT_S)
        message, (fd,), _, _ = socket.recv_fds(connection, 16, 1)
    return int(message), fd
