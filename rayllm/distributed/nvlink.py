"""Whether two GPUs are linked by NVLink, as NVIDIA's management library says (NVML, part of every driver)."""

from __future__ import annotations

import ctypes
from typing import Any

_NVLINK_CAPABILITY = 2
"""`NVML_P2P_CAPS_INDEX_NVLINK` of nvml.h."""


def has_nvlink(uuid: str, other_uuid: str, library: Any = None) -> bool:
    """For GPUs by their UUIDs (`GPU-...`); also through switches. RuntimeError where NVML cannot say."""
    nvml = library or ctypes.CDLL("libnvidia-ml.so.1")
    _check("nvmlInit_v2", nvml.nvmlInit_v2())
    try:
        handles = []
        for each in (uuid, other_uuid):
            handles.append(ctypes.c_void_p())
            code = nvml.nvmlDeviceGetHandleByUUID(each.encode(), ctypes.byref(handles[-1]))
            _check("nvmlDeviceGetHandleByUUID", code)
        status = ctypes.c_int(-1)
        code = nvml.nvmlDeviceGetP2PStatus(*handles, _NVLINK_CAPABILITY, ctypes.byref(status))
        _check("nvmlDeviceGetP2PStatus", code)
        return status.value == 0
    finally:
        nvml.nvmlShutdown()


def _check(name: str, code: int) -> None:
    if code:
        raise RuntimeError(f"{name} failed with {code}")
