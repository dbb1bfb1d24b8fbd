"""Memory that two processes of this machine share, in place of a GPU's."""

from __future__ import annotations

import ctypes
import mmap
import os

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class HostPeerMemory:
    """`rayllm.distributed.cuda_memory.PeerMemory` on the host: zeroed pages of a file that has no name."""

    def __init__(self) -> None:
        self._mapped: list[tuple[int, int]] = []

    def allocate(self, num_bytes: int) -> tuple[int, int]:
        fd = os.memfd_create("peers")
        os.ftruncate(fd, num_bytes)
        return self._map(fd, num_bytes), fd

    def map(self, fd: int, num_bytes: int) -> int:
        try:
            return self._map(fd, num_bytes)
        finally:
            os.close(fd)

    def close(self) -> None:
        mapped, self._mapped = self._mapped, []
        for address, num_bytes in mapped:
            assert _LIBC.munmap(address, num_bytes) == 0

    def _map(self, fd: int, num_bytes: int) -> int:
        address = _LIBC.mmap(None, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        assert address != ctypes.c_void_p(-1).value
        self._mapped.append((address, num_bytes))
        return int(address)


class BrokenPeerMemory(HostPeerMemory):
    """One whose driver refuses to map what another process allocated."""

    def map(self, fd: int, num_bytes: int) -> int:
        os.close(fd)
        raise RuntimeError("cuMemMap failed with 801: operation not supported")


class DeafPeerMemory(HostPeerMemory):
    """One that maps something else than the peer's memory: what is written there, the peer never sees."""

    def map(self, fd: int, num_bytes: int) -> int:
        os.close(fd)
        address, own = self.allocate(num_bytes)
        os.close(own)
        return address
