"""Launches that are compiled ahead of time: see `ahead_of_time.py`."""

from __future__ import annotations

import torch
from ahead_of_time import meta

from rayllm_kernels.moe import ExpertWeights, choose_experts, mix_experts

REQUIRED = {name: {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"} for name in ("gate_up_kernel", "down_kernel")}


def launches(arch: int) -> None:
    f32 = torch.float32
    for num_tokens in (1, 64, 1024, 8192):
        _mixture(num_tokens, 8, 128, 2048, 768)  # Qwen3-30B-A3B
    _mixture(32, 2, 8, 4096, 14336, dtype=torch.float16)  # Mixtral-8x7B
    _mixture(32, 4, 32, 2880, 2880, "clamped_swiglu", bias=True)  # gpt-oss-20b
    _mixture(4096, 8, 256, 7168, 2048, held=32, shared=True)  # DeepSeek-V3, a rank of eight
    choose_experts(meta(32, 128), None, 8, "softmax", renormalize=True)
    choose_experts(meta(32, 32), None, 4, "softmax", renormalize=True)
    groups = {"num_groups": 8, "top_groups": 4, "group_score": "top2_sum"}
    choose_experts(meta(32, 256, dtype=f32), meta(256, dtype=f32), 8, "sigmoid", renormalize=True, scale=2.5, **groups)
    choose_experts(meta(32, 160, dtype=f32), None, 6, "softmax", renormalize=False, num_groups=8, top_groups=3)


def _mixture(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    width: int,
    inner: int,
    activation: str = "silu",
    bias: bool = False,
    held: int | None = None,
    shared: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    held = held or num_experts
    weights = ExpertWeights(
        meta(held, 2 * inner, width, dtype=dtype),
        meta(held, 2 * inner, dtype=dtype) if bias else None,
        meta(held, width, inner, dtype=dtype),
        meta(held, width, dtype=dtype) if bias else None,
        activation,
        total=num_experts,
    )
    x = meta(num_tokens, width, dtype=dtype)
    experts = meta(num_tokens, top_k, dtype=torch.int32)
    scores = meta(num_tokens, top_k, dtype=torch.float32)
    added = {"shared_TD": x, "shared_gate_T1": x[:, :1], "residual_TD": x} if shared else {}
    mix_experts(x, experts, scores, weights, **added)
