"""Products of rows sorted by expert with the weights of each. Shape letters: E experts held, M rows of a program, N
outputs, K inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rayllm_kernels.activation.triton import gate_times_up


@triton.jit
def rows_of(starts_ptr, tile, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert that a tile belongs to, its first row and the end of the expert's rows. Each expert has as many tiles
    as its rows need; the expert of a tile behind all of them is NUM_EXPERTS or more."""
    experts_E = tl.arange(0, BLOCK_E)
    kept_E = experts_E < NUM_EXPERTS
    starts_E = tl.load(starts_ptr + experts_E, mask=kept_E, other=0)
    stops_E = tl.load(starts_ptr + 1 + experts_E, mask=kept_E, other=0)
    num_tiles_E = tl.cdiv(stops_E - starts_E, BLOCK_M)
    is_before_E = tl.cumsum(num_tiles_E, 0) <= tile
    expert = tl.sum(is_before_E.to(tl.int32), 0)
    first_tile = tl.sum(tl.where(is_before_E, num_tiles_E, 0), 0)
    start = tl.sum(tl.where(experts_E == expert, starts_E, 0), 0)
    stop = tl.sum(tl.where(experts_E == expert, stops_E, 0), 0)
    return expert, start + (tile - first_tile) * BLOCK_M, stop


@triton.jit
def gate_up_kernel(
    x_ptr, weight_ptr, bias_ptr, scores_ptr, starts_ptr, choices_ptr, out_ptr, alpha, limit, x_stride,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, SCORES: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """activation(gate(x)) * up(x), rows sorted by expert. Programs (outputs, tile): those that share rows are
    neighbours, and tiles that share weights."""
    expert, row, stop = rows_of(starts_ptr, tl.program_id(1), NUM_EXPERTS, BLOCK_E, BLOCK_M)
    if expert >= NUM_EXPERTS:
        return
    rows_M, channels_N = row + tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # What is read in place of rows and outputs past the end is not stored.
    choices_M = tl.load(choices_ptr + tl.minimum(rows_M, stop - 1))
    x_ptr += (choices_M // TOP_K).to(tl.int64)[:, None] * x_stride
    weight_ptr += expert.to(tl.int64) * (2 * INNER * WIDTH) + tl.minimum(channels_N, INNER - 1)[:, None] * WIDTH
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for begin in range(0, WIDTH, BLOCK_K):
        inputs_K = begin + tl.arange(0, BLOCK_K)[None, :]
        mask = (inputs_K < WIDTH) if WIDTH % BLOCK_K else None
        other = 0.0 if WIDTH % BLOCK_K else None
        x = tl.trans(tl.load(x_ptr + inputs_K, mask=mask, other=other))
        gate_weight = tl.load(weight_ptr + inputs_K, mask=mask, other=other)
        gate = tl.dot(gate_weight, x, gate, input_precision="ieee")
        up_weight = tl.load(weight_ptr + INNER * WIDTH + inputs_K, mask=mask, other=other)
        up = tl.dot(up_weight, x, up, input_precision="ieee")
    if SCORES:
        scores_M = tl.load(scores_ptr + choices_M)
        gate *= scores_M[None, :]
        up *= scores_M[None, :]
    if BIAS:
        bias_ptr += expert * 2 * INNER + tl.minimum(channels_N, INNER - 1)
        gate += tl.load(bias_ptr).to(tl.float32)[:, None]
        up += tl.load(bias_ptr + INNER).to(tl.float32)[:, None]
    out = tl.trans(gate_times_up(gate, up, alpha, limit, ACTIVATION)).to(out_ptr.dtype.element_ty)
    kept = (rows_M < stop)[:, None] & (channels_N < INNER)[None, :]
    tl.store(out_ptr + rows_M.to(tl.int64)[:, None] * INNER + channels_N[None, :], out, mask=kept)


@triton.jit
def down_kernel(
    inner_ptr, weight_ptr, bias_ptr, scores_ptr, starts_ptr, choices_ptr, out_ptr,
    NUM_EXPERTS: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr, SCORES: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(inner @ weight.T + bias) * score; each row is stored at its choice. Programs as those of `gate_up_kernel`."""
    expert, row, stop = rows_of(starts_ptr, tl.program_id(1), NUM_EXPERTS, BLOCK_E, BLOCK_M)
    if expert >= NUM_EXPERTS:
        return
    rows_M, channels_N = row + tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    choices_M = tl.load(choices_ptr + tl.minimum(rows_M, stop - 1))
    inner_ptr += tl.minimum(rows_M, stop - 1).to(tl.int64)[:, None] * INNER
    weight_ptr += expert.to(tl.int64) * (INNER * WIDTH) + tl.minimum(channels_N, WIDTH - 1)[:, None] * INNER
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for begin in range(0, INNER, BLOCK_K):
        inputs_K = begin + tl.arange(0, BLOCK_K)[None, :]
        mask = (inputs_K < INNER) if INNER % BLOCK_K else None
        other = 0.0 if INNER % BLOCK_K else None
        inner = tl.trans(tl.load(inner_ptr + inputs_K, mask=mask, other=other))
        sums = tl.dot(tl.load(weight_ptr + inputs_K, mask=mask, other=other), inner, sums, input_precision="ieee")
    if BIAS:
        bias_N = tl.load(bias_ptr + expert * WIDTH + tl.minimum(channels_N, WIDTH - 1))
        sums += bias_N.to(tl.float32)[:, None]
    if SCORES:
        sums *= tl.load(scores_ptr + choices_M)[None, :]
    kept = (rows_M < stop)[:, None] & (channels_N < WIDTH)[None, :]
    out = tl.trans(sums).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + choices_M.to(tl.int64)[:, None] * WIDTH + channels_N[None, :], out, mask=kept)
