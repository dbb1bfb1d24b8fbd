"""Launches that are compiled ahead of time: see `ahead_of_time.py`."""

from __future__ import annotations

import torch
from ahead_of_time import meta

from rayllm_kernels.apply_plan import apply_plan


def launches(arch: int) -> None:
    words, tokens = meta(500, dtype=torch.int32), meta(256, dtype=torch.int64)
    apply_plan(meta(200_000, dtype=torch.int32), words, words, tokens, meta(256, dtype=torch.int32), tokens)
