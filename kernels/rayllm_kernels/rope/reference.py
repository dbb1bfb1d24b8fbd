"""Rotary position embedding (Su et al., 2021). Shape letters: T tokens, H heads, D head width, R rotated width (R <= D;
channels past R pass through unchanged).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, in_pairs: bool = False) -> Tensor:
    """Rotates channels i and i + R/2 of every head by the angle of its token; with `in_pairs`, channels 2i and 2i + 1.

    `cos_TR` and `sin_TR` hold the R/2 angles twice (both halves alike), in the dtype of `x_THD`. Returns a new tensor.
    """
    width = cos_TR.shape[-1]
    if in_pairs:
        return _in_pairs(x_THD, cos_TR[:, : width // 2], sin_TR[:, : width // 2])
    half = width // 2
    cos, sin = cos_TR.unsqueeze(1), sin_TR[:, :half].unsqueeze(1)
    left, right = x_THD[..., :half], x_THD[..., half:width]
    if width == x_THD.shape[-1]:
        out = x_THD * cos
    else:
        out = torch.cat((x_THD[..., :width] * cos, x_THD[..., width:]), dim=-1)
    out[..., :half].addcmul_(right, sin, value=-1)
    out[..., half:width].addcmul_(left, sin)
    return out


def _in_pairs(x_THD: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """P = R / 2 pairs of neighbouring channels."""
    width = 2 * cos_TP.shape[-1]
    cos, sin = cos_TP.unsqueeze(1), sin_TP.unsqueeze(1)
    out = x_THD.clone()
    left, right = x_THD[..., 0:width:2], x_THD[..., 1:width:2]
    out[..., 0:width:2] = left * cos - right * sin
    out[..., 1:width:2] = right * cos + left * sin
    return out
