from __future__ import annotations

from typing import Any

import pytest

from rayllm.distributed.nvlink import has_nvlink


class _Nvml:
    """A machine where the GPUs `a` and `b` are linked, and `c` is not."""

    def __init__(self, fails: str = ""):
        self.is_open, self._fails = False, fails

    def nvmlInit_v2(self) -> int:
        self.is_open = True
        return 0

    def nvmlShutdown(self) -> int:
        self.is_open = False
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        handle._obj.value = uuid[-1]
        return 999 if self._fails else 0

    def nvmlDeviceGetP2PStatus(self, one: Any, other: Any, capability: int, status: Any) -> int:
        assert self.is_open
        assert capability == 2
        status._obj.value = 0 if {one.value, other.value} == {ord("a"), ord("b")} else 4
        return 0


def test_two_gpus_are_linked_or_not() -> None:
    nvml = _Nvml()
    assert has_nvlink("GPU-a", "GPU-b", nvml)
    assert not has_nvlink("GPU-a", "GPU-c", nvml)
    assert not nvml.is_open


def test_a_library_that_cannot_say_is_an_error() -> None:
    nvml = _Nvml(fails="all")
    with pytest.raises(RuntimeError, match="nvmlDeviceGetHandleByUUID failed with 999"):
        has_nvlink("GPU-a", "GPU-b", nvml)
    assert not nvml.is_open
