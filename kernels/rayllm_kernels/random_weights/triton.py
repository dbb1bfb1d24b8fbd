"""`reference` without the whole tensor: only the part is drawn."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.launch import launch

_BLOCK = 1024


def uniform_part(out: Tensor, shape: tuple[int, ...], dim: int, part: range, seed: int, bound: float) -> Tensor:
    """See `reference.uniform_part`."""
    inner = math.prod(shape[dim + 1 :])
    launch(
        _uniform_part,
        (triton.cdiv(out.numel(), _BLOCK),),
        out,
        out.numel(),
        len(part) * inner,
        max(0, min(part.stop, shape[dim]) - part.start) * inner,
        part.start * inner,
        shape[dim] * inner,
        seed,
        bound,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=("num_elements", "width", "num_drawn", "first", "stride", "seed"))
def _uniform_part(out_ptr, num_elements, width, num_drawn, first, stride, seed, bound, BLOCK: tl.constexpr):
    """Rows of `width`, of which `num_drawn` are drawn, begin at `first` of rows of `stride`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = at // width, at % width
    index = row * stride + first + column
    zero = tl.zeros([BLOCK], tl.int32)
    word, _, _, _ = tl.philox(seed, (index & 0xFFFFFFFF).to(tl.uint32), (index >> 32).to(tl.uint32), zero, zero)
    drawn = ((word >> 8).to(tl.float32) * 1.1920928955078125e-07 - 1.0) * bound
    out = tl.where(column < num_drawn, drawn, 0.0)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=at < num_elements)
