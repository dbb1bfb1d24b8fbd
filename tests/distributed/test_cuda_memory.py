"""What the CUDA driver is asked for when memory is shared, in place of a driver that does it."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest

from rayllm.distributed.cuda_memory import CudaPeerMemory

GRANULARITY = 2 << 20


class _Driver:
    """Notes each call with the values of its arguments and answers as the driver does."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._fails = fails
        self._written = {
            "cuMemGetAllocationGranularity": GRANULARITY,
            "cuMemCreate": 77,
            "cuMemImportFromShareableHandle": 88,
            "cuMemExportToShareableHandle": 5,
        }
        self._next_address = 0x1000

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self._answer(name, *arguments)

    def _answer(self, name: str, *arguments: Any) -> int:
        if name == "cuGetErrorString":
            arguments[1]._obj.value = b"operation not supported"
            return 0
        if name == self._fails:
            return 801
        if name == "cuMemAddressReserve":
            self._next_address += 0x1000
            arguments[0]._obj.value = self._next_address
        elif name in self._written:
            arguments[0]._obj.value = self._written[name]
        self.calls.append((name, *(getattr(argument, "value", argument) for argument in arguments)))
        return 0

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


def test_memory_is_made_for_this_gpu_zeroed_and_exported_as_a_file_descriptor() -> None:
    driver = _Driver()
    assert CudaPeerMemory(3, driver).allocate(100) == (0x2000, 5)
    assert driver.names() == [
        "cuMemGetAllocationGranularity", "cuMemCreate", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess",
        "cuMemsetD8_v2", "cuCtxSynchronize", "cuMemExportToShareableHandle",
    ]  # fmt: skip
    [create] = [call for call in driver.calls if call[0] == "cuMemCreate"]
    properties = create[3]._obj
    assert (create[2], properties.location.id, properties.requested_handle_types) == (GRANULARITY, 3, 1)
    assert ctypes.sizeof(properties) == 32  # CUmemAllocationProp of cuda.h, on 64-bit systems
    assert ("cuMemMap", 0x2000, GRANULARITY, 0, 77, 0) in driver.calls
    assert ("cuMemsetD8_v2", 0x2000, 0, GRANULARITY) in driver.calls


def test_what_a_peer_allocated_is_mapped_and_its_descriptor_closed() -> None:
    driver, fd = _Driver(), os.open(os.devnull, os.O_RDONLY)
    memory = CudaPeerMemory(0, driver)
    assert memory.map(fd, GRANULARITY + 1) == 0x2000
    assert ("cuMemMap", 0x2000, 2 * GRANULARITY, 0, 88, 0) in driver.calls
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    driver.calls.clear()
    memory.close()
    memory.close()
    assert driver.calls == [
        ("cuMemUnmap", 0x2000, 2 * GRANULARITY), ("cuMemAddressFree", 0x2000, 2 * GRANULARITY), ("cuMemRelease", 88),
    ]  # fmt: skip


def test_what_was_taken_before_a_failure_is_given_back() -> None:
    driver = _Driver(fails="cuMemMap")
    memory = CudaPeerMemory(0, driver)
    with pytest.raises(RuntimeError, match="cuMemMap failed with 801"):
        memory.allocate(1)
    driver.calls.clear()
    memory.close()
    assert driver.names() == ["cuMemAddressFree", "cuMemRelease"]


def test_what_the_driver_refuses_is_an_error_with_its_words() -> None:
    with pytest.raises(RuntimeError, match="cuMemCreate failed with 801: operation not supported"):
        CudaPeerMemory(0, _Driver(fails="cuMemCreate")).allocate(1)
