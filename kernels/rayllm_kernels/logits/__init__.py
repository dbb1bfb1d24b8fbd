"""From the ranks' products to logits."""

from __future__ import annotations

from torch import Tensor

from rayllm_kernels.device import uses_triton
from rayllm_kernels.logits import reference

__all__ = ["join_logits"]


def join_logits(parts_PNV: Tensor, vocab_size: int, scale: float = 1.0, soft_cap: float | None = None) -> Tensor:
    """The logits of the whole vocabulary in float32. `reference.join_logits` says more."""
    if uses_triton(parts_PNV):
        from rayllm_kernels.logits import triton

        return triton.join_logits(parts_PNV, vocab_size, scale, soft_cap)
    return reference.join_logits(parts_PNV, vocab_size, scale, soft_cap)
