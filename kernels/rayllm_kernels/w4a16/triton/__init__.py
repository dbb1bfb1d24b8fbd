"""Products with four-bit weights on a GPU. Shape letters: M tokens of a program, N outputs of it, K inputs.

The weights are the left, register operand of the tensor cores and tokens the columns, so that few tokens do not leave
most of an instruction's rows empty. A weight becomes a float by a bit-or: 128 + q in bfloat16, 1024 + q in float16.
What that adds, and the zero, are taken off again times the sum of a group's activations: for few tokens by one more
product, since tensor cores wait for weights, and for many by a sum of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.launch import launch
from rayllm_kernels.w4a16.triton.split import join_parts, leave_part, num_splits
from rayllm_kernels.w4a16.weight import CHUNK, MIN_BLOCK_OUTPUTS, TILE, Int4Weight

_ADDED = {torch.bfloat16: (128, 0x43004300), torch.float16: (1024, 0x64006400), torch.float32: (0, 0)}
"""What the bit-or adds to a weight, and its bits in both halves of a word; float32 is converted instead."""


@dataclass(frozen=True, slots=True)
class _Tile:
    tokens: int
    outputs: int
    num_warps: int
    num_stages: int


def int4_linear(x_TI: Tensor, weight: Int4Weight, bias_O: Tensor | None = None) -> Tensor:
    """See `reference.int4_linear`; summed in float32, in an order that follows from the shapes. Two calls with one
    weight must not run at once."""
    num_tokens, num_inputs = x_TI.shape
    if num_inputs != weight.num_inputs:
        raise ValueError(f"x has {num_inputs} inputs, and the weight {weight.num_inputs}")
    if weight.order_I is not None:
        x_TI = x_TI.index_select(1, weight.order_I)
    assert x_TI.stride(1) == 1, "inputs must be neighbours"
    num_outputs = weight.num_outputs
    chunks, (added, bits) = _chunks_of_a_group(weight), _ADDED[x_TI.dtype]
    tile = _tile(num_tokens, chunks, x_TI.dtype)
    num_blocks, num_rows = triton.cdiv(num_outputs, tile.outputs), triton.cdiv(num_tokens, tile.tokens)
    splits = num_splits(num_blocks, triton.cdiv(num_inputs, TILE)) if num_rows == 1 else 1
    out_TO = torch.empty((num_tokens, num_outputs), dtype=x_TI.dtype, device=x_TI.device)
    num_parts = splits if splits > 1 else 0
    parts = torch.empty((num_parts, num_blocks, tile.tokens, tile.outputs), dtype=torch.float32, device=x_TI.device)
    launch(
        int4_kernel,
        (num_blocks, num_rows, splits),
        x_TI,
        weight.words_OW,
        weight.scales_GO,
        weight.zeros_GO,
        bias_O,
        parts,
        weight.arrivals,
        out_TO,
        num_tokens,
        x_TI.stride(0),
        INPUTS=num_inputs,
        OUTPUTS=num_outputs,
        GROUP=weight.group_size,
        CHUNKS=chunks,
        ADDED=added,
        BITS=bits,
        BIAS=bias_O is not None,
        SPLITS=splits,
        CHUNK=CHUNK,
        BLOCK_M=tile.tokens,
        BLOCK_N=tile.outputs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_TO


def _tile(num_tokens: int, chunks_of_a_group: int, dtype: torch.dtype) -> _Tile:
    if dtype == torch.float32:  # without tensor cores
        return _Tile(16, MIN_BLOCK_OUTPUTS, num_warps=4, num_stages=1)
    # The sums of a tile's groups stand side by side in the tensor memory of compute capability 10.0, 512 columns.
    most = 64 if chunks_of_a_group > 1 else 32
    tokens = min(max(triton.next_power_of_2(num_tokens), 16), most)
    if num_tokens <= tokens:
        return _Tile(tokens, 64, num_warps=4, num_stages=4 if tokens <= 32 else 3)
    return _Tile(tokens, 128, num_warps=8, num_stages=3)


def _chunks_of_a_group(weight: Int4Weight) -> int:
    """How many of a tile's chunks can be summed before the scale is applied."""
    if weight.group_size % TILE == 0 or weight.group_size >= weight.num_inputs:
        return TILE // CHUNK
    return weight.group_size // CHUNK if TILE % weight.group_size == 0 else 1


@triton.jit(do_not_specialize=["num_tokens"])
def int4_kernel(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, bias_ptr, parts_ptr, arrivals_ptr, out_ptr, num_tokens, x_stride,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr, ADDED: tl.constexpr,
    BITS: tl.constexpr, BIAS: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Programs (outputs, tokens, part of the inputs). The last of those that share an output joins their parts."""
    block, split = tl.program_id(0), tl.program_id(2)
    tokens_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = (tokens_M < num_tokens)[:, None] & (outputs_N < OUTPUTS)[None, :]
    # What is read in place of tokens and outputs past the end is not stored.
    x_ptr += tl.minimum(tokens_M, num_tokens - 1).to(tl.int64)[:, None] * x_stride
    NUM_TILES: tl.constexpr = (INPUTS + 8 * CHUNK - 1) // (8 * CHUNK)
    PER_SPLIT: tl.constexpr = (NUM_TILES + SPLITS - 1) // SPLITS
    sums = _multiplied(
        x_ptr, words_ptr, scales_ptr, zeros_ptr, tl.minimum(outputs_N, OUTPUTS - 1),
        split * PER_SPLIT, tl.minimum((split + 1) * PER_SPLIT, NUM_TILES),
        INPUTS, OUTPUTS, GROUP, CHUNKS, ADDED, BITS, NUM_TILES, CHUNK, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if SPLITS > 1:
        BLOCKS: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
        if leave_part(sums, parts_ptr, arrivals_ptr, block, split, BLOCKS) < SPLITS - 1:
            return
        sums = join_parts(parts_ptr, arrivals_ptr, block, BLOCKS, SPLITS, BLOCK_M, BLOCK_N)
    if BIAS:
        sums += tl.load(bias_ptr + tl.minimum(outputs_N, OUTPUTS - 1)).to(tl.float32)[:, None]
    at = tokens_M.to(tl.int64)[:, None] * OUTPUTS + outputs_N[None, :]
    tl.store(out_ptr + at, tl.trans(sums).to(out_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _multiplied(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, outputs_N, tile, end_tile,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr, ADDED: tl.constexpr,
    BITS: tl.constexpr, NUM_TILES: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sums over a range of tiles, `[N, M]`."""
    LAST_GROUP: tl.constexpr = (INPUTS - 1) // GROUP
    inputs_K = tl.arange(0, CHUNK)
    words_ptr += outputs_N[:, None].to(tl.int64) * (NUM_TILES * CHUNK) + inputs_K[None, :]
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for t in range(tile, end_tile):
        words = tl.load(words_ptr + t * CHUNK)
        for chunk in tl.static_range(8):
            first = (t * 8 + chunk) * CHUNK
            if chunk % CHUNKS == 0:
                at = tl.minimum(first // GROUP, LAST_GROUP) * OUTPUTS + outputs_N
                scales_N = tl.load(scales_ptr + at).to(tl.float32)
                zeros_N = tl.load(zeros_ptr + at).to(tl.float32) + ADDED
                part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                x_sum_M = tl.zeros([BLOCK_M], tl.float32)
            mask = (first + inputs_K < INPUTS)[None, :] if INPUTS % (8 * CHUNK) else None
            other = 0.0 if INPUTS % (8 * CHUNK) else None
            x = tl.load(x_ptr + first + inputs_K[None, :], mask=mask, other=other)
            part = tl.dot(_floats(words, chunk, BITS, x.dtype), tl.trans(x), part, input_precision="ieee")
            if BLOCK_M <= 32:
                minus_zeros = tl.broadcast_to((-zeros_N).to(x.dtype)[:, None], [BLOCK_N, CHUNK])
                part = tl.dot(minus_zeros, tl.trans(x), part, input_precision="ieee")
            else:
                x_sum_M += tl.sum(x.to(tl.float32), 1)
            if (chunk + 1) % CHUNKS == 0:
                if BLOCK_M > 32:
                    part -= zeros_N[:, None] * x_sum_M[None, :]
                sums += part * scales_N[:, None]
    return sums


@triton.jit
def _floats(words, CHUNK_NUMBER: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """A chunk of words plus what BITS add; even chunks are in the lower halves of words, odd ones in the upper."""
    SHIFT: tl.constexpr = CHUNK_NUMBER // 2 * 4
    if BITS == 0:
        return ((words >> (SHIFT + CHUNK_NUMBER % 2 * 16)) & 15).to(DTYPE)
    pairs = ((words >> SHIFT) & 0x000F000F) | BITS
    if CHUNK_NUMBER % 2:
        pairs = pairs >> 16
    return pairs.to(tl.int16).to(DTYPE, bitcast=True)
