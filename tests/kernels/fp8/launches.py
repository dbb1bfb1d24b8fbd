"""Launches that are compiled ahead of time: see `ahead_of_time.py`."""

from __future__ import annotations

import torch
from ahead_of_time import meta

from rayllm_kernels.fp8 import Fp8Weight, fp8_linear

REQUIRED = {"fp8_kernel": {90: "QGMMA", 100: "UTCQMMA"}}


def launches(arch: int) -> None:
    if arch < 90:  # narrower GPUs do not convert float8
        return
    for num_tokens in (1, 64, 2048):
        _product(num_tokens, 4096, 14336, (14336, 1))  # Llama-3-8B, gate or up
        _product(num_tokens, 14336, 4096, (1, 1), is_fixed=True)
        _product(num_tokens, 7168, 2048, (16, 56))  # DeepSeek-V3
    _product(16, 7168, 576, (5, 56), bias=True, dtype=torch.float16)


def _product(
    num_tokens: int,
    num_inputs: int,
    num_outputs: int,
    scales: tuple[int, int],
    is_fixed: bool = False,
    bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    weight = Fp8Weight(
        meta(num_outputs, num_inputs, dtype=torch.float8_e4m3fn),
        meta(*scales, dtype=torch.float32),
        meta(1, dtype=torch.float32) if is_fixed else None,
        meta(num_outputs, dtype=torch.int32),
    )
    fp8_linear(meta(num_tokens, num_inputs, dtype=dtype), weight, meta(num_outputs, dtype=dtype) if bias else None)
