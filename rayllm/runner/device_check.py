"""A check of the device's arithmetic and memory, made once by each worker that starts, before it loads anything: a
broken device would otherwise show as a hang, or as wrong tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayllm.config import ResolvedConfig
from rayllm.errors import ConfigError, WorkerDiedError

_TILE = 64
_NUM_TILES = {"cpu": 1, "cuda": 32}
"""Repetitions of the product's tile in each direction: on a GPU, enough for every multiprocessor to have a part."""
_PATTERN_BYTES = {"cpu": 2**16, "cuda": 2**26}
_LEAST_CAPABILITY = {"bfloat16": (8, 0)}
"""What a GPU must have to compute in a dtype at its full speed, or at all."""


def check_device(config: ResolvedConfig, rank: int, device: torch.device) -> None:
    """Raises `WorkerDiedError` with what was computed and what was expected, `ConfigError` for a dtype that the device
    does not have. No peer takes part. It costs nothing on a CPU; on a GPU, which compares by itself, a few milliseconds
    and 250 MB for as long."""
    try:
        check_capability(config.dtype, device)
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


def check_capability(dtype: str, device: torch.device) -> None:
    """Raises `ConfigError` where the device's instructions lack the dtype."""
    least = _LEAST_CAPABILITY.get(dtype)
    if least is None or device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if found < least:
        raise ConfigError(
            f"dtype={dtype!r} needs a GPU of compute capability {least[0]}.{least[1]}, and {device_name(device)} has "
            f"{found[0]}.{found[1]}: use --dtype half"
        )


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
    return _difference("computed", found, (a @ b).to(device, dtype).repeat(times, times))


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """The product that the check computes."""
    return a @ b


def _memory_fault(device: torch.device) -> str | None:
    """A pattern and its opposite, written and read back; what is expected was written elsewhere."""
    pattern, expected = (
        torch.arange(_PATTERN_BYTES[device.type] // 4, dtype=torch.int32, device=device) for _ in range(2)
    )
    return _difference("stored", pattern.clone(), expected) or _difference("stored", (~pattern).clone(), ~expected)


def _difference(action: str, found: Tensor, expected: Tensor) -> str | None:
    """Compared where they are: only a count comes back, unless it is not 0."""
    wrong = found != expected
    num_wrong = int(wrong.sum())
    if not num_wrong:
        return None
    first = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{action} {num_wrong} of {expected.numel()} values incorrectly; the first, at {list(first)}, is "
        f"{float(found[first]):g} instead of {float(expected[first]):g}"
    )
