"""A check of the device's arithmetic and memory, made once by each worker that starts, before it loads anything: a
broken device would otherwise show as a hang, or as wrong tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayllm.config import ResolvedConfig
from rayllm.errors import WorkerDiedError

_TILE = 64
_NUM_TILES = {"cpu": 1, "cuda": 32}
"""Repetitions of the product's tile in each direction: on a GPU, enough for every multiprocessor to have a part."""
_PATTERN_BYTES = {"cpu": 2**16, "cuda": 2**26}


def check_device(config: ResolvedConfig, rank: int, device: torch.device) -> None:
    """Raises `WorkerDiedError` with what was computed and what was expected. No peer takes part. It costs nothing on a
    CPU; on a GPU, a few milliseconds and 200 MB for as long."""
    try:
        fault = (
            _memory_shortage(config, device)
            or _multiplication_fault(device, getattr(torch, config.dtype))
            or _memory_fault(device)
        )
    except RuntimeError as error:  # CUDA's own
        fault = f"failed: {' '.join(str(error).split())}"
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the KV pool is to have it
    if fault:
        raise WorkerDiedError(rank, f"its device ({device_name(device)}) {fault}")


def device_name(device: torch.device) -> str:
    """The device's name for logs and errors."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _memory_shortage(config: ResolvedConfig, device: torch.device) -> str | None:
    engine = config.engine
    if device.type != "cuda" or engine.num_kv_blocks is not None or engine.kv_cache_memory_bytes is not None:
        return None
    free, total = torch.cuda.mem_get_info(device)
    if total - free < total * engine.gpu_memory_utilization:
        return None
    return (
        f"has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, so gpu_memory_utilization="
        f"{engine.gpu_memory_utilization:g} leaves nothing for this engine: stop the processes that use the rest"
    )


def _multiplication_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """A product of small whole numbers, which every dtype holds exactly, against the same in whole numbers on the
    CPU."""
    count = torch.arange(_TILE * _TILE).view(_TILE, _TILE)
    a, b = count * 7 % 5 - 2, count * 11 % 3 - 1
    times = _NUM_TILES[device.type]
    found = multiply(a.to(device, dtype).repeat(times, 1), b.to(device, dtype).repeat(1, times))
    return _difference("computed", found, (a @ b).repeat(times, times))


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """The product that the check computes."""
    return a @ b


def _memory_fault(device: torch.device) -> str | None:
    """A pattern and its opposite, written and read back."""
    pattern = torch.arange(_PATTERN_BYTES[device.type] // 4, dtype=torch.int32)
    for written in (pattern, ~pattern):
        if fault := _difference("stored", written.to(device).clone(), written):
            return fault
    return None


def _difference(action: str, found: Tensor, expected: Tensor) -> str | None:
    found, expected = found.cpu().double(), expected.double()
    wrong = (found != expected).nonzero()
    if not len(wrong):
        return None
    first = tuple(wrong[0].tolist())
    return (
        f"{action} {len(wrong)} of {expected.numel()} values incorrectly; the first, at {list(first)}, is "
        f"{found[first]:g} instead of {expected[first]:g}"
    )
