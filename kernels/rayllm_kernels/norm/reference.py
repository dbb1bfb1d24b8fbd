"""Root-mean-square norm (Zhang and Sennrich, 2019) and layer norm (Ba et al., 2016). Shape letter: D width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, computed in float32.

    Given `[T, heads, D]`, with a weight `[D]` or `[heads, D]`, it is the per-head form for queries and keys.

    The result has the dtype of `x`. A weight in float32 beside a narrower `x` is multiplied before the rounding.
    """
    if weight_D.dtype != x.dtype:
        return rms_norm(x.float(), weight_D, eps).to(x.dtype)
    if weight_D.dim() == 1:
        return F.rms_norm(x, weight_D.shape, weight_D, eps)
    return F.rms_norm(x, weight_D.shape[-1:], None, eps).mul_(weight_D)


def add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed, sum) where sum = x + residual, which becomes the next residual. `residual` is written in place."""
    residual.add_(x)
    return rms_norm(residual, weight_D, eps), residual


def rms_norm_add(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """residual + rms_norm(x), written to `residual`, which is returned."""
    return residual.add_(rms_norm(x, weight_D, eps))


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension."""
    return F.layer_norm(x, (x.shape[-1],), weight_D, bias_D, eps)
