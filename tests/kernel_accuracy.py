"""What tests compare kernels by: seeded inputs, and errors in float64."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
"""The relative error that each dtype is allowed."""


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; NaN anywhere makes it NaN, which no bound accepts."""
    return float((found.double() - expected).norm() / expected.norm())
