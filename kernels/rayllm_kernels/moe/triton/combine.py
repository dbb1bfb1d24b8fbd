"""The sum of what a token's experts computed."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def combine_kernel(
    y_ptr, experts_ptr, shared_ptr, gate_ptr, residual_ptr, out_ptr, first, end, shared_stride, gate_stride,
    residual_stride, width, TOP_K: tl.constexpr, SHARED: tl.constexpr, SHARED_GATE: tl.constexpr,
    RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs (token, channels). A token's choices are summed in their order, whatever other tokens are in the step;
    of experts that are not held (below `first` or not below `end`) nothing is read."""
    token = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = channels < width
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        choice = token * TOP_K + k
        expert = tl.load(experts_ptr + choice)
        num_read = tl.where((expert >= first) & (expert < end), width, 0)
        total += tl.load(y_ptr + choice * width + channels, mask=channels < num_read, other=0.0).to(tl.float32)
    if SHARED:
        shared = tl.load(shared_ptr + token * shared_stride + channels, mask=kept, other=0.0).to(tl.float32)
        if SHARED_GATE:
            shared *= tl.sigmoid(tl.load(gate_ptr + token * gate_stride).to(tl.float32))
        total += shared
    if RESIDUAL:
        total += tl.load(residual_ptr + token * residual_stride + channels, mask=kept, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + channels, total.to(out_ptr.dtype.element_ty), mask=kept)
