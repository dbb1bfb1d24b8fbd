"""Memory of a GPU that another process maps, by the CUDA driver's virtual memory management (CUDA Driver API, "Virtual
Memory Management"; the structures are those of cuda.h, CUDA 11.3 to 13).

Not `cudaIpcGetMemHandle`, whose memory may be gone where its owner dies: here it stays for as long as a process maps
it, so that a kernel of a survivor that still touches a dead rank's memory does not fault. Not torch's symmetric memory:
it counts its rendezvous in the process (`StoreExchange` in torch's CUDASymmetricMemoryUtils.hpp), so that a rank that
replaces another never meets the survivors, and a kernel of its that waits for a dead peer cannot be ended.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, Protocol


class PeerMemory(Protocol):
    """Allocates memory that other processes can map, and maps theirs."""

    def allocate(self, num_bytes: int) -> tuple[int, int]:
        """Zeroed memory: its address, and a file descriptor by which another process maps it."""

    def map(self, fd: int, num_bytes: int) -> int:
        """The address in this process of what another one allocated; closes the descriptor."""

    def close(self) -> None:
        """Unmaps and frees all. No kernel may use it any more."""


_POSIX_FD = 1
_DEVICE = 1
_PINNED = 1
_READ_WRITE = 3


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _AllocationFlags(ctypes.Structure):
    _fields_ = [
        ("compression_type", ctypes.c_ubyte),
        ("gpu_direct_rdma_capable", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class _AllocationProperties(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("requested_handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32_handle_metadata", ctypes.c_void_p),
        ("flags", _AllocationFlags),
    ]


class _AccessDescriptor(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


class CudaPeerMemory:
    """`PeerMemory` of a GPU whose context is current in the calling thread. Raises `RuntimeError` with the driver's
    words for what it refuses."""

    def __init__(self, device_index: int, driver: Any = None):
        self._driver = driver or ctypes.CDLL("libcuda.so.1")
        self._location = _Location(_DEVICE, device_index)
        self._properties = _AllocationProperties(_PINNED, _POSIX_FD, self._location)
        self._undo: list[tuple[Any, ...]] = []
        """Calls that give back what was taken, to be made from the last to the first."""

    def allocate(self, num_bytes: int) -> tuple[int, int]:
        size, handle = self._rounded(num_bytes), ctypes.c_ulonglong()
        self._call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(self._properties), _zero())
        self._undo.append(("cuMemRelease", handle))
        address = self._map(handle, size)
        self._call("cuMemsetD8_v2", address, ctypes.c_ubyte(0), size)
        self._call("cuCtxSynchronize")
        fd = ctypes.c_int()
        self._call("cuMemExportToShareableHandle", ctypes.byref(fd), handle, _POSIX_FD, _zero())
        return address.value, fd.value

    def map(self, fd: int, num_bytes: int) -> int:
        handle = ctypes.c_ulonglong()
        try:
            self._call("cuMemImportFromShareableHandle", ctypes.byref(handle), ctypes.c_void_p(fd), _POSIX_FD)
        finally:
            os.close(fd)
        self._undo.append(("cuMemRelease", handle))
        return self._map(handle, self._rounded(num_bytes)).value

    def close(self) -> None:
        while self._undo:
            self._call(*self._undo.pop())

    def _rounded(self, num_bytes: int) -> ctypes.c_size_t:
        """The size of an allocation, which is a multiple of the driver's granularity."""
        granularity = ctypes.c_size_t()
        self._call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(self._properties), 0)
        return ctypes.c_size_t(-(-num_bytes // granularity.value) * granularity.value)

    def _map(self, handle: ctypes.c_ulonglong, size: ctypes.c_size_t) -> ctypes.c_ulonglong:
        """Where this GPU reads and writes an allocation."""
        address = ctypes.c_ulonglong()
        self._call("cuMemAddressReserve", ctypes.byref(address), size, ctypes.c_size_t(0), _zero(), _zero())
        self._undo.append(("cuMemAddressFree", address, size))
        self._call("cuMemMap", address, size, ctypes.c_size_t(0), handle, _zero())
        self._undo.append(("cuMemUnmap", address, size))
        access = _AccessDescriptor(self._location, _READ_WRITE)
        self._call("cuMemSetAccess", address, size, ctypes.byref(access), ctypes.c_size_t(1))
        return address

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name} failed with {code}: {(text.value or b'unknown error').decode()}")


def _zero() -> ctypes.c_ulonglong:
    return ctypes.c_ulonglong(0)
