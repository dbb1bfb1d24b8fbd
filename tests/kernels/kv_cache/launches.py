"""Launches that are compiled ahead of time: see `ahead_of_time.py`."""

from __future__ import annotations

import torch
from ahead_of_time import meta

from rayllm_kernels.kv_cache.triton import write_kv, write_latent


def launches(arch: int) -> None:
    slots = meta(64, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn) if arch > 80 else (torch.bfloat16,):
        for heads, width in ((8, 128), (32, 80), (1, 256)):
            k, cache = meta(64, heads, width), meta(99, heads, 64, width, dtype=dtype)
            write_kv(k, k, cache, cache, slots)
        write_latent(meta(64, 576), meta(99, 1, 64, 576, dtype=dtype), slots)
