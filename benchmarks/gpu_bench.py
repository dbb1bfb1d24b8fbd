"""How `gpu.py` measures a kernel: inputs, times on rotating buffers, errors in float64."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_report import Row
from torch import Tensor

BYTES_PER_S = 4.3e12
"""What a copy reaches on one H200; targets are shares of it."""
_L2_BYTES = 50 * 2**20
_MAX_SETS = 16
_NUM_REPLAYS = 11
TOLERANCES = {torch.bfloat16: 4e-3, torch.float32: 1e-5}
ATTENTION_TOLERANCES = {torch.bfloat16: 5e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class Bench:
    """Where kernels run, and how large."""

    device: torch.device
    is_smoke: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.is_smoke else torch.bfloat16  # the interpreter is wrong in bfloat16

    def size(self, full: int, smoke: int) -> int:
        return smoke if self.is_smoke else full

    def random(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=dtype or self.dtype)

    def sets(self, make: Callable[[int], Callable[[], Any]], num_bytes: int) -> list[Callable[[], Any]]:
        """Calls on different buffers, so many that none finds its inputs in the cache of the GPU."""
        count = 1 if self.is_smoke else min(_MAX_SETS, 1 + math.ceil(4 * _L2_BYTES / num_bytes))
        return [make(seed) for seed in range(count)]

    def microseconds(self, calls: Sequence[Callable[[], Any]]) -> float:
        """The median of one call's time, without the host: on a GPU the calls are replayed as a CUDA graph."""
        if self.device.type == "cpu":
            began_s = time.perf_counter()
            calls[0]()
            return (time.perf_counter() - began_s) * 1e6
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        times_us = []
        for _ in range(_NUM_REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times_us.append(begin.elapsed_time(end) * 1e3 / len(calls))
        graph.reset()
        return statistics.median(times_us[1:])

    def bandwidth(
        self, name: str, make: Callable[[int], Callable[[], Any]], num_bytes: int, share: float | None
    ) -> Iterator[Row]:
        """Time, and the share of `BYTES_PER_S` at which `num_bytes` are moved; a target where there is a `share`."""
        us = self.microseconds(self.sets(make, num_bytes))
        reached = num_bytes / us * 1e6 / BYTES_PER_S
        floor_us = num_bytes / BYTES_PER_S * 1e6
        note = f"{us:.1f} µs, floor {floor_us:.1f}"
        yield Row(name, reached, "of copy", at_least=None if self.is_smoke else share, note=note)

    def latency(
        self, name: str, make: Callable[[int], Callable[[], Any]], num_bytes: int, at_most_us: float | None
    ) -> Iterator[Row]:
        us = self.microseconds(self.sets(make, num_bytes))
        yield Row(name, us, "µs", at_most=None if self.is_smoke else at_most_us)

    def error(self, name: str, found: Tensor, expected: Tensor, tolerances: dict[torch.dtype, float]) -> Row:
        """‖found − expected‖ / ‖expected‖ in float64."""
        error = float((found.double() - expected.double()).norm() / expected.double().norm())
        return Row(f"{name}: error", error, "", at_most=tolerances[self.dtype])
