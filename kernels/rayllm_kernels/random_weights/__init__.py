"""Random weights drawn where they are used, part by part."""

from __future__ import annotations

import torch
from torch import Tensor

from rayllm_kernels.device import uses_triton
from rayllm_kernels.random_weights import reference

__all__ = ["uniform_part"]


def uniform_part(out: Tensor, shape: tuple[int, ...], dim: int, part: range, seed: int, bound: float) -> Tensor:
    """Fills `out` with its part of a random tensor. `reference.uniform_part` says which."""
    assert out.shape == torch.Size([*shape[:dim], len(part), *shape[dim + 1 :]])
    if uses_triton(out):
        from rayllm_kernels.random_weights import triton

        return triton.uniform_part(out, shape, dim, part, seed, bound)
    return reference.uniform_part(out, shape, dim, part, seed, bound)
