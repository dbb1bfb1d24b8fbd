"""Launches that are compiled ahead of time: see `ahead_of_time.py`."""

from __future__ import annotations

import torch
from ahead_of_time import meta

from rayllm_kernels.rope.triton import HeadNorm, Rotation, cos_sin, rope_and_write, rope_and_write_latent

NUM_TOKENS = 64


def launches(arch: int) -> None:
    positions, frequencies = meta(NUM_TOKENS, dtype=torch.int64), meta(128, dtype=torch.float32)
    cos_sin(positions, frequencies, 1.0, torch.bfloat16)
    cos_sin(positions, frequencies, 1.0, torch.bfloat16, (meta(NUM_TOKENS, dtype=torch.bool), frequencies, 1.2))
    _layer(32, 8, 128, 128)  # Llama 3
    _layer(32, 8, 128, 128, normed=True)  # Qwen 3
    _layer(14, 2, 64, 64)  # Qwen 2
    _layer(32, 2, 128, 64, in_pairs=True)  # GLM 4
    _layer(32, 32, 80, 20)  # GPT-NeoX
    _layer(16, 8, 256, 256, normed=True)  # Gemma 3
    _layer(40, 40, 128, 0)  # OPT
    _latent_layer(16, 1536)  # DeepSeek-V3 on eight ranks
    if arch > 80:
        _latent_layer(128, 0, cache=torch.float8_e4m3fn)
        _layer(32, 8, 128, 128, cache=torch.float8_e4m3fn)


def _latent_layer(num_heads: int, first: int, cache: torch.dtype = torch.bfloat16) -> None:
    turn = meta(NUM_TOKENS, 64)
    rope_and_write_latent(
        meta(NUM_TOKENS, num_heads, 192),
        meta(NUM_TOKENS, first + 576)[:, first:],
        meta(99, 1, 64, 576, dtype=cache),
        meta(NUM_TOKENS, dtype=torch.int64),
        Rotation(turn, turn, True),
        meta(512),
        1e-6,
    )


def _layer(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    *,
    in_pairs: bool = False,
    normed: bool = False,
    cache: torch.dtype = torch.bfloat16,
) -> None:
    turn = meta(NUM_TOKENS, rotary_dim)
    pages = meta(99, num_kv_heads, 64, head_dim, dtype=cache)
    rope_and_write(
        meta(NUM_TOKENS, num_heads + 2 * num_kv_heads, head_dim),
        pages,
        pages,
        meta(NUM_TOKENS, dtype=torch.int64),
        Rotation(turn, turn, in_pairs) if rotary_dim else None,
        HeadNorm(meta(num_heads + num_kv_heads, head_dim), 1e-6) if normed else None,
    )
