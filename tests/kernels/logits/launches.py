"""Launches that are compiled ahead of time: see `ahead_of_time.py`."""

from __future__ import annotations

import torch
from ahead_of_time import meta

from rayllm_kernels.logits.triton import join_logits


def launches(arch: int) -> None:
    join_logits(meta(1, 64, 128256), 128256)
    join_logits(meta(8, 64, 32000), 255999, 0.0625, 30.0)
    join_logits(meta(2, 64, 75968, dtype=torch.float16), 151936)
