"""Launches that are compiled ahead of time: see `ahead_of_time.py`."""

from __future__ import annotations

from unittest.mock import patch

import torch
from ahead_of_time import meta

from rayllm_kernels.attention import PagedLines, Scoring, paged_decode, paged_prefill, triton

SHAPES = {
    "Llama-3-8B": (32, 8, 128),
    "Qwen2-0.5B": (14, 2, 64),
    "Phi-3-mini": (32, 32, 96),
    "Gemma-2-9B": (16, 8, 256),
    "Falcon-7B": (71, 1, 64),
}
"""(query heads, key/value heads, head width)."""

REQUIRED = {"prefill_kernel": {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}}


def launches(arch: int) -> None:
    f32 = torch.float32
    with patch.object(triton, "device_shape", lambda _: (arch // 10, 132)):
        for name in ("Llama-3-8B", "Qwen2-0.5B", "Phi-3-mini", "Falcon-7B"):
            _both(*SHAPES[name], Scoring(0.1))
        _both(*SHAPES["Llama-3-8B"], Scoring(0.1), dtype=torch.float16, page_size=16)
        _both(*SHAPES["Gemma-2-9B"], Scoring(0.1, window=4096, soft_cap=50.0))
        _both(64, 8, 64, Scoring(0.1, window=128, sinks_H=meta(64, dtype=f32)))  # gpt-oss-120b
        _both(112, 112, 128, Scoring(0.1, slopes_H=meta(112, dtype=f32)))  # BLOOM
        if arch >= 90:  # narrower GPUs do not convert float8
            for name in ("Llama-3-8B", "Gemma-2-9B"):
                _both(*SHAPES[name], Scoring(0.1, k_scale=0.5, v_scale=0.5), cache_dtype=torch.float8_e4m3fn)


def _both(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scoring: Scoring,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    page_size: int = 64,
) -> None:
    """Decode of 32 lines, and a prefill of 2,048 tokens."""
    cache = meta(1000, num_kv_heads, page_size, head_dim, dtype=cache_dtype or dtype)
    rows, lens, starts, arrivals = (meta(size, dtype=torch.int32) for size in (32, 32, 33, 65536))
    lines = PagedLines(rows, lens, meta(256, 128, dtype=torch.int32), starts, 32)
    q = meta(2048, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)[:, :num_heads]
    out = meta(2048, num_heads, head_dim, dtype=dtype)
    paged_decode(q[:32], cache, cache, lines, scoring, arrivals, out[:32])
    paged_prefill(q, cache, cache, lines, scoring, out)
