"""Launches that are compiled ahead of time: see `ahead_of_time.py`."""

from __future__ import annotations

import torch
from ahead_of_time import meta

from rayllm_kernels.activation.triton import clamped_swiglu, gelu_mul, gelu_tanh_mul, relu_mul, silu_mul


def launches(arch: int) -> None:
    gate_up = meta(64, 2 * 14336)
    for function in (silu_mul, gelu_mul, gelu_tanh_mul, relu_mul):
        function(gate_up)
    silu_mul(meta(64, 2 * 13696, dtype=torch.float16))
    clamped_swiglu(meta(64, 2 * 2880), 1.702, 7.0)
