"""Launches that are compiled ahead of time: see `ahead_of_time.py`."""

from __future__ import annotations

from ahead_of_time import meta

from rayllm_kernels.random_weights.triton import uniform_part


def launches(arch: int) -> None:
    uniform_part(meta(16032, 4096), (128256, 4096), 0, range(16032, 32064), 2**62 + 1, 0.02)
