"""Launches that are compiled ahead of time: see `ahead_of_time.py`."""

from __future__ import annotations

import torch
from ahead_of_time import meta

from rayllm_kernels.apply_plan import apply_plan


def launches(arch: int) -> None:
    ints = [meta(size, dtype=torch.int32) for size in (200_000, 500, 500, 256, 256, 256)]
    apply_plan(*ints)
