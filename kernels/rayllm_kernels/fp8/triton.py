"""Products with weights and activations of eight bits on a GPU, of compute capability 8.9 or later. Shape letters: M
tokens of a program, N outputs of it, K inputs of a step; T tokens, I inputs, O outputs, G groups of inputs.

The weights are the left operand of the tensor cores and tokens the columns, so that few tokens do not leave most of an
instruction's rows empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.fp8.reference import LARGEST, SMALLEST_SCALE
from rayllm_kernels.fp8.weight import BLOCK, Fp8Weight
from rayllm_kernels.launch import launch
from rayllm_kernels.w4a16.triton.split import join_parts, leave_part, num_splits

_MAX_COLUMNS = 4096
"""Inputs that a program quantizes at once."""


@dataclass(frozen=True, slots=True)
class _Tile:
    tokens: int
    outputs: int
    num_warps: int


def fp8_linear(x_TI: Tensor, weight: Fp8Weight, bias_O: Tensor | None = None) -> Tensor:
    """See `reference.fp8_linear`; summed in float32, in an order that follows from the shapes. Two calls with one
    weight must not run at once."""
    num_outputs, num_inputs = weight.values_OI.shape
    if x_TI.shape[1] != num_inputs:
        raise ValueError(f"x has {x_TI.shape[1]} inputs, and the weight {num_inputs}")
    values_TI, scales_TG = quantize(x_TI, BLOCK if weight.has_blocks else num_inputs, weight.input_scale)
    num_tokens, tile = x_TI.shape[0], _tile(x_TI.shape[0], weight.has_blocks)
    num_blocks, num_rows = triton.cdiv(num_outputs, tile.outputs), triton.cdiv(num_tokens, tile.tokens)
    splits = num_splits(num_blocks, triton.cdiv(num_inputs, BLOCK)) if num_rows == 1 else 1
    out_TO = torch.empty((num_tokens, num_outputs), dtype=x_TI.dtype, device=x_TI.device)
    num_parts = splits if splits > 1 else 0
    parts = torch.empty((num_parts, num_blocks, tile.tokens, tile.outputs), dtype=torch.float32, device=x_TI.device)
    launch(
        fp8_kernel,
        (num_blocks, num_rows, splits),
        values_TI,
        scales_TG,
        weight.values_OI,
        weight.scales,
        bias_O,
        parts,
        weight.arrivals,
        out_TO,
        num_tokens,
        INPUTS=num_inputs,
        OUTPUTS=num_outputs,
        BLOCKS_SCALED=weight.has_blocks,
        OUTPUTS_SCALED=weight.scales.shape[0] > 1,
        BIAS=bias_O is not None,
        SPLITS=splits,
        BLOCK_M=tile.tokens,
        BLOCK_N=tile.outputs,
        BLOCK_K=BLOCK,
        num_warps=tile.num_warps,
        num_stages=4,
    )
    return out_TO


def _tile(num_tokens: int, has_blocks: bool) -> _Tile:
    """Where scales are of blocks, a step's sums and all sums are in registers together."""
    if num_tokens <= 64 or has_blocks:
        tokens = min(max(triton.next_power_of_2(num_tokens), 16), 64)
        return _Tile(tokens, 64, num_warps=8 if has_blocks and tokens == 64 else 4)
    return _Tile(128, 128, num_warps=8)


def quantize(x_TI: Tensor, group_size: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `reference.quantize`. NaN stays NaN."""
    assert x_TI.stride(1) == 1, "inputs must be neighbours"
    num_tokens, num_inputs = x_TI.shape
    num_groups = triton.cdiv(num_inputs, group_size)
    values_TI = torch.empty((num_tokens, num_inputs), dtype=torch.float8_e4m3fn, device=x_TI.device)
    scales_TG = torch.empty((num_tokens, num_groups), dtype=torch.float32, device=x_TI.device)
    columns = min(triton.next_power_of_2(group_size), _MAX_COLUMNS)
    rows = min(triton.next_power_of_2(num_groups), max(_MAX_COLUMNS // 4 // columns, 1))
    launch(
        quantize_kernel,
        (num_tokens, triton.cdiv(num_groups, rows)),
        x_TI,
        scale,
        values_TI,
        scales_TG,
        x_TI.stride(0),
        INPUTS=num_inputs,
        GROUP=group_size,
        GROUPS=num_groups,
        FIXED=scale is not None,
        LARGEST=LARGEST,
        SMALLEST_SCALE=SMALLEST_SCALE,
        BLOCK_G=rows,
        BLOCK_K=columns,
        num_warps=4,
    )
    return values_TI, scales_TG


@triton.jit
def quantize_kernel(
    x_ptr, scale_ptr, values_ptr, scales_ptr, x_stride,
    INPUTS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, FIXED: tl.constexpr, LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs (token, some groups of its inputs)."""
    token = tl.program_id(0).to(tl.int64)
    groups_G, inputs_K = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K)
    x_ptr += token * x_stride
    values_ptr += token * INPUTS
    scales_G = tl.zeros([BLOCK_G], tl.float32)
    if FIXED:
        scales_G += tl.load(scale_ptr)
    else:
        for begin in range(0, GROUP, BLOCK_K):
            of_group_K = begin + inputs_K
            at = groups_G[:, None] * GROUP + of_group_K[None, :]
            mask = (of_group_K < GROUP)[None, :] & (at < INPUTS)
            x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
            scales_G = tl.maximum(scales_G, tl.max(tl.abs(x), 1))
        scales_G = tl.maximum(scales_G / LARGEST, SMALLEST_SCALE)
    tl.store(scales_ptr + token * GROUPS + groups_G, scales_G, mask=groups_G < GROUPS)
    for begin in range(0, GROUP, BLOCK_K):
        of_group_K = begin + inputs_K
        at = groups_G[:, None] * GROUP + of_group_K[None, :]
        mask = (of_group_K < GROUP)[None, :] & (at < INPUTS)
        values = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) / scales_G[:, None]
        # Comparisons, not minimum and maximum, which lose NaN: a fault must stay visible in the logits.
        values = tl.where(values > LARGEST, LARGEST, tl.where(values < -LARGEST, -LARGEST, values))
        tl.store(values_ptr + at, values.to(values_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def fp8_kernel(
    x_ptr, x_scales_ptr, weight_ptr, scales_ptr, bias_ptr, parts_ptr, arrivals_ptr, out_ptr, num_tokens,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCKS_SCALED: tl.constexpr, OUTPUTS_SCALED: tl.constexpr,
    BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs (outputs, tokens, part of the inputs). The last of those that share an output joins their parts."""
    block, split = tl.program_id(0), tl.program_id(2)
    tokens_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
    # What is read in place of tokens and outputs past the end is not stored.
    read_M, read_N = tl.minimum(tokens_M, num_tokens - 1).to(tl.int64), tl.minimum(outputs_N, OUTPUTS - 1)
    STEPS: tl.constexpr = (INPUTS + BLOCK_K - 1) // BLOCK_K
    PER_SPLIT: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    if BLOCKS_SCALED:
        scales_ptr += block * BLOCK_N // BLOCK_K * STEPS
        x_scales_ptr += read_M * STEPS
    sums = _multiplied(
        x_ptr + read_M[:, None] * INPUTS, x_scales_ptr, weight_ptr + read_N[:, None].to(tl.int64) * INPUTS, scales_ptr,
        split * PER_SPLIT, tl.minimum((split + 1) * PER_SPLIT, STEPS), INPUTS, BLOCKS_SCALED, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if SPLITS > 1:
        BLOCKS: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
        if leave_part(sums, parts_ptr, arrivals_ptr, block, split, BLOCKS) < SPLITS - 1:
            return
        sums = join_parts(parts_ptr, arrivals_ptr, block, BLOCKS, SPLITS, BLOCK_M, BLOCK_N)
    if not BLOCKS_SCALED:
        sums *= tl.load(x_scales_ptr + read_M)[None, :]
        sums *= tl.load(scales_ptr + read_N)[:, None] if OUTPUTS_SCALED else tl.load(scales_ptr)
    if BIAS:
        sums += tl.load(bias_ptr + read_N).to(tl.float32)[:, None]
    kept = (tokens_M < num_tokens)[:, None] & (outputs_N < OUTPUTS)[None, :]
    at = tokens_M.to(tl.int64)[:, None] * OUTPUTS + outputs_N[None, :]
    tl.store(out_ptr + at, tl.trans(sums).to(out_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _multiplied(
    x_ptr, x_scales_ptr, weight_ptr, scales_ptr, step, end_step, INPUTS: tl.constexpr, BLOCKS_SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sums over a range of steps, `[N, M]`; the scales of blocks are in them. The tensor cores of compute
    capability 9.0 keep 14 bits of a sum: it is taken out of them and added in float32 after every step."""
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(step, end_step):
        inputs_K = k * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        mask = (inputs_K < INPUTS) if INPUTS % BLOCK_K else None
        other = 0.0 if INPUTS % BLOCK_K else None
        x = tl.trans(tl.load(x_ptr + inputs_K, mask=mask, other=other))
        weight = tl.load(weight_ptr + inputs_K, mask=mask, other=other)
        if BLOCKS_SCALED:
            scales_M = tl.load(x_scales_ptr + k) * tl.load(scales_ptr + k)
            sums += tl.dot(weight, x) * scales_M[None, :]
        else:
            sums = tl.dot(weight, x, sums, max_num_imprecise_acc=BLOCK_K)
    return sums
