"""Rotary position embedding, and all else between a layer's projections and its attention. `reference` says what each
function computes."""

from __future__ import annotations

import torch
from torch import Tensor

from rayllm_kernels.device import uses_triton
from rayllm_kernels.rope import reference
from rayllm_kernels.rope.reference import HeadNorm, Rotation, rope

__all__ = ["HeadNorm", "Rotation", "cos_sin", "rope", "rope_and_write", "rope_and_write_latent"]


def cos_sin(
    positions_T: Tensor,
    frequencies_R: Tensor,
    factor: float,
    dtype: torch.dtype,
    beyond: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a step's angles."""
    if uses_triton(positions_T):
        from rayllm_kernels.rope import triton

        return triton.cos_sin(positions_T, frequencies_R, factor, dtype, beyond)
    return reference.cos_sin(positions_T, frequencies_R, factor, dtype, beyond)


def rope_and_write(
    qkv_TAD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Tensor,
    rotation: Rotation | None,
    norm: HeadNorm | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Norm and rotation of queries and keys; keys and values to their slots; returns the queries."""
    if uses_triton(qkv_TAD):
        from rayllm_kernels.rope import triton

        return triton.rope_and_write(qkv_TAD, k_cache, v_cache, slots_T, rotation, norm, k_scale, v_scale)
    return reference.rope_and_write(qkv_TAD, k_cache, v_cache, slots_T, rotation, norm, k_scale, v_scale)


def rope_and_write_latent(
    q_THD: Tensor,
    down_TW: Tensor,
    cache: Tensor,
    slots_T: Tensor,
    rotation: Rotation,
    weight_C: Tensor,
    eps: float,
    scale: float = 1.0,
) -> None:
    """Rotation of queries in place; latents, normed, and their keys, rotated, to their slots."""
    if uses_triton(q_THD):
        from rayllm_kernels.rope import triton

        triton.rope_and_write_latent(q_THD, down_TW, cache, slots_T, rotation, weight_C, eps, scale)
    else:
        reference.rope_and_write_latent(q_THD, down_TW, cache, slots_T, rotation, weight_C, eps, scale)
