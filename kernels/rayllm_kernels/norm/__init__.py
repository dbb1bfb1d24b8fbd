"""Normalisation over the last dimension. `reference` says what each function computes."""

from __future__ import annotations

from torch import Tensor

from rayllm_kernels.device import uses_triton
from rayllm_kernels.norm import reference

__all__ = ["add_rms_norm", "layer_norm", "rms_norm", "rms_norm_add"]


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight."""
    if uses_triton(x):
        from rayllm_kernels.norm import triton

        return triton.rms_norm(x, weight_D, eps)
    return reference.rms_norm(x, weight_D, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed, sum) where sum = x + residual, written to `residual`."""
    if uses_triton(x):
        from rayllm_kernels.norm import triton

        return triton.add_rms_norm(x, residual, weight_D, eps)
    return reference.add_rms_norm(x, residual, weight_D, eps)


def rms_norm_add(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """residual + rms_norm(x), written to `residual`."""
    if uses_triton(x):
        from rayllm_kernels.norm import triton

        return triton.rms_norm_add(x, residual, weight_D, eps)
    return reference.rms_norm_add(x, residual, weight_D, eps)


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias."""
    if uses_triton(x):
        from rayllm_kernels.norm import triton

        return triton.layer_norm(x, weight_D, bias_D, eps)
    return reference.layer_norm(x, weight_D, bias_D, eps)
