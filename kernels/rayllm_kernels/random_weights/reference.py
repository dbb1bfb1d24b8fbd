"""Uniform numbers by counter: element i of a tensor is a function of (seed, i), so each rank draws its part alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rayllm_kernels.sampling.reference import philox

_MASK32 = 2**32 - 1


def uniform_part(out: Tensor, shape: tuple[int, ...], dim: int, part: range, seed: int, bound: float) -> Tensor:
    """Entries `part` along `dim` of a tensor of `shape` that is uniform in [-bound, bound), and zeros past its end.
    Written to `out`, which is contiguous, and returned.

    Element i, in row-major order, is bound * (2 u - 1), in float32, where u is the upper 24 bits of the first word of
    Philox-4x32-10 (Salmon et al., 2011) with counter i and key `seed` (64 bits).
    """
    index = torch.arange(math.prod(shape))
    zero = torch.zeros_like(index)
    key_21 = torch.tensor([seed & _MASK32, seed >> 32]).unsqueeze(1)
    words = philox(torch.stack((index & _MASK32, index >> 32, zero, zero)), key_21.expand(2, len(index)))
    whole = ((words[0] >> 8).float() * 2**-23 - 1) * bound
    num_drawn = max(0, min(part.stop, shape[dim]) - part.start)
    out.zero_().narrow(dim, 0, num_drawn).copy_(whole.view(shape).narrow(dim, min(part.start, shape[dim]), num_drawn))
    return out
