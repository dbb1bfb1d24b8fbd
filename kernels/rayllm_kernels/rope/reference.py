"""Rotary position embedding (Su et al., 2021), half-rotation form. Shape letters: T tokens, H heads, D head width,
R rotated width (R <= D; channels past R pass through unchanged).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotates channel i and i + R/2 of every head by the angle of its token.

    `cos_TR` and `sin_TR` hold each angle twice (both halves alike), in the dtype of `x_THD`. Returns a new tensor.
    """
    width = cos_TR.shape[-1]
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
