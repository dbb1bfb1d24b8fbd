"""Launches that are compiled ahead of time: see `ahead_of_time.py`."""

from __future__ import annotations

import torch
from ahead_of_time import meta

from rayllm_kernels.w4a16 import Int4Weight, int4_linear
from rayllm_kernels.w4a16.weight import TILE

REQUIRED = {"int4_kernel": {80: "HMMA", 90: "HGMMA"}}


def launches(arch: int) -> None:
    for num_tokens in (1, 32, 64, 2048):
        _product(num_tokens, 4096, 14336, 128)  # Llama-3-8B, gate or up
    _product(16, 14336, 4096, 128)
    _product(16, 14336, 4096, 128, dtype=torch.float16)
    _product(2048, 4096, 4096, 32)
    _product(16, 896, 4864, 32, bias=True)  # Qwen2-0.5B
    _product(16, 4096, 4096, 4096)


def _product(
    num_tokens: int,
    num_inputs: int,
    num_outputs: int,
    group_size: int,
    bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    num_words, num_groups = -(-num_inputs // TILE) * 32, -(-num_inputs // group_size)
    weight = Int4Weight(
        meta(num_outputs, num_words, dtype=torch.int32),
        meta(num_groups, num_outputs, dtype=torch.float16),
        meta(num_groups, num_outputs, dtype=torch.uint8),
        group_size,
        num_inputs,
        None,
        meta(num_outputs, dtype=torch.int32),
    )
    x = meta(num_tokens, num_inputs, dtype=dtype)
    int4_linear(x, weight, meta(num_outputs, dtype=dtype) if bias else None)
