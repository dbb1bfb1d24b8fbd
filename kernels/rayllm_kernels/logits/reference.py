"""Logits in float32. Shape letters: P parts of the vocabulary, N positions, V words of a part."""

from __future__ import annotations

import torch
from torch import Tensor


def join_logits(parts_PNV: Tensor, vocab_size: int, scale: float = 1.0, soft_cap: float | None = None) -> Tensor:
    """The first `vocab_size` words of all parts, side by side, times `scale`; then c * tanh(logit / c) where there is a
    `soft_cap` c. Float32 `[N, vocab_size]`, which may be the memory of a single part."""
    joined = parts_PNV[0] if len(parts_PNV) == 1 else torch.cat(parts_PNV.unbind(0), dim=-1)
    logits_NV = joined[:, :vocab_size].float()
    if scale != 1.0:
        logits_NV = logits_NV * scale
    if soft_cap is not None:
        logits_NV = (logits_NV / soft_cap).tanh_().mul_(soft_cap)
    return logits_NV
