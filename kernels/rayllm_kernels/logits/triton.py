"""`reference` in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.launch import launch

_BLOCK = 2048


def join_logits(parts_PNV: Tensor, vocab_size: int, scale: float = 1.0, soft_cap: float | None = None) -> Tensor:
    """See `reference.join_logits`; the parts are contiguous."""
    num_parts, num_positions, width = parts_PNV.shape
    logits_NV = torch.empty((num_positions, vocab_size), dtype=torch.float32, device=parts_PNV.device)
    launch(
        _join_logits,
        (num_positions, triton.cdiv(width, _BLOCK), num_parts),
        parts_PNV,
        logits_NV,
        width,
        vocab_size,
        scale,
        soft_cap,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return logits_NV


@triton.jit
def _join_logits(parts_ptr, logits_ptr, width, vocab_size, scale, soft_cap, BLOCK: tl.constexpr):
    position, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = word < tl.minimum(width, vocab_size - part * width)
    row = part * tl.num_programs(0) + position
    logit = tl.load(parts_ptr + row * width + word, mask=mask, other=0.0).to(tl.float32) * scale
    if soft_cap is not None:
        shrunk = tl.exp(-2.0 * tl.abs(logit / soft_cap))
        size = soft_cap * (1.0 - shrunk) / (1.0 + shrunk)
        logit = tl.where(logit < 0.0, -size, size)
    tl.store(logits_ptr + position * vocab_size + part * width + word, logit, mask=mask)
