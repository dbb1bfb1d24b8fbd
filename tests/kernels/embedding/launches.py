"""Launches that are compiled ahead of time: see `ahead_of_time.py`."""

from __future__ import annotations

import torch
from ahead_of_time import meta

from rayllm_kernels.embedding.triton import embed_part


def launches(arch: int) -> None:
    embed_part(meta(64, dtype=torch.int64), meta(16032, 4096), 16032)
