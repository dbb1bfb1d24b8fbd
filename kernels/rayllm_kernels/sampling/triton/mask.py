"""`reference.mask` in one launch, which writes the ids that are ruled out and reads nothing but bits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.launch import launch

_BLOCK = 4096


def mask(logits_NV: Tensor, lines_G: Tensor, bits_GB: Tensor) -> None:
    """See `reference.mask`."""
    (num_lines, num_bytes), vocab_size = bits_GB.shape, logits_NV.shape[1]
    assert logits_NV.is_contiguous()
    assert bits_GB.is_contiguous()
    grid = (num_lines, triton.cdiv(vocab_size, _BLOCK))
    launch(_mask, grid, logits_NV, lines_G, bits_GB, vocab_size, num_bytes, BLOCK=_BLOCK, num_warps=4)


@triton.jit
def _mask(logits_ptr, lines_ptr, bits_ptr, vocab_size, num_bytes, BLOCK: tl.constexpr):
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_id = ids < vocab_size
    line = tl.load(lines_ptr + tl.program_id(0)).to(tl.int64)
    bits = tl.load(bits_ptr + tl.program_id(0).to(tl.int64) * num_bytes + ids // 8, mask=is_id, other=0).to(tl.int32)
    is_banned = is_id & (((bits >> (ids % 8)) & 1) == 0)
    tl.store(logits_ptr + line * vocab_size + ids, -float("inf"), mask=is_banned)
