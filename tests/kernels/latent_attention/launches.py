"""Launches that are compiled ahead of time: see `ahead_of_time.py`."""

from __future__ import annotations

from unittest.mock import patch

import torch
from ahead_of_time import meta

from rayllm_kernels.attention import PagedLines
from rayllm_kernels.latent_attention import paged_latent_decode, paged_latent_prefill, triton

REQUIRED = {"latent_prefill_kernel": {100: "UTCHMMA"}}


def launches(arch: int) -> None:
    """DeepSeek-V2-Lite, or an eighth of DeepSeek-V3, and all of it."""
    with patch.object(triton, "device_shape", lambda _: (arch // 10, 132)):
        _both(16, torch.bfloat16)
        _both(128, torch.float16)


def _both(num_heads: int, dtype: torch.dtype) -> None:
    cache = meta(1000, 1, 64, 576, dtype=dtype)
    rows, lens, starts, arrivals = (meta(size, dtype=torch.int32) for size in (32, 32, 33, 65536))
    lines = PagedLines(rows, lens, meta(256, 128, dtype=torch.int32), starts, 32)
    q, out = meta(2048, num_heads, 576, dtype=dtype), meta(2048, num_heads, 512, dtype=dtype)
    paged_latent_decode(q[:32], cache, lines, 0.1, arrivals, out[:32])
    paged_latent_prefill(q, cache, lines, 0.1, out)
