"""Attention of one query a line, by programs that each have some keys of a line and all query heads that share a
key/value head, at least 16 as tensor cores want. Shape letters: M query heads of a program, N keys of a tile, D head
width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rayllm_kernels.attention.triton.split import join_parts, leave_part, part_of
from rayllm_kernels.attention.triton.tile import LOG2_E, add_tile, page_of, scores_of


@triton.jit(do_not_specialize_on_alignment=("rows_ptr", "kv_lens_ptr"))  # they begin at any line
def decode_kernel(
    q_ptr, k_ptr, v_ptr, rows_ptr, kv_lens_ptr, table_ptr, sinks_ptr, slopes_ptr, out_ptr,
    sums_ptr, masses_ptr, arrivals_ptr, inner, outer, v_scale, window, q_stride, q_head_stride, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MIN_TILES: tl.constexpr,
):  # fmt: skip
    """Programs (line, key/value head times tile of its query heads, part of the keys)."""
    line, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    HEAD_TILES: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    kv_head, head_tile = tl.program_id(1) // HEAD_TILES, tl.program_id(1) % HEAD_TILES
    of_group_M = head_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    kept_M, heads_M, channels_D = of_group_M < GROUP, kv_head * GROUP + of_group_M, tl.arange(0, BLOCK_D)
    kept = kept_M[:, None] & (channels_D < HEAD_DIM)[None, :]
    out_ptr += (line * KV_HEADS * GROUP + heads_M[:, None]) * HEAD_DIM + channels_D[None, :]
    kv_len = tl.load(kv_lens_ptr + line)
    begin = tl.maximum(kv_len - window, 0) if WINDOW else 0
    first_tile = begin // BLOCK_N
    tile, end_tile, num_parts = part_of(tl.cdiv(kv_len, BLOCK_N) - first_tile, split, tl.num_programs(2), MIN_TILES)
    if tile >= end_tile:
        if split == 0:  # a line without keys
            tl.store(out_ptr, tl.zeros([BLOCK_M, BLOCK_D], out_ptr.dtype.element_ty), mask=kept)
        return
    q = tl.load(q_ptr + line * q_stride + heads_M[:, None] * q_head_stride + channels_D[None, :], mask=kept, other=0.0)
    slopes_M = tl.load(slopes_ptr + heads_M, mask=kept_M, other=0.0) if ALIBI else 0.0
    table_ptr += tl.load(rows_ptr + line).to(tl.int64) * table_stride
    sums, highest_M, mass_M = _attend(
        q, k_ptr, v_ptr, table_ptr, kv_head, begin, kv_len, first_tile + tile, first_tile + end_tile,
        slopes_M, inner, outer, KV_HEADS, HEAD_DIM, PAGE, SOFT_CAP, ALIBI, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if num_parts > 1:
        line_and_tile = line * tl.num_programs(1) + tl.program_id(1)
        sums_ptr += line_and_tile * tl.num_programs(2) * BLOCK_M * HEAD_DIM
        masses_ptr += line_and_tile * tl.num_programs(2) * BLOCK_M * 2
        arrivals_ptr += line_and_tile
        num_before = leave_part(
            sums, highest_M, mass_M, sums_ptr, masses_ptr, arrivals_ptr, split, kept_M, HEAD_DIM, BLOCK_D
        )
        if num_before + 1 < num_parts:
            return
        tl.store(arrivals_ptr, 0)
        sums, highest_M, mass_M = join_parts(sums_ptr, masses_ptr, num_parts, kept_M, HEAD_DIM, BLOCK_M, BLOCK_D)
    if SINKS:
        sinks_M = tl.load(sinks_ptr + heads_M, mask=kept_M, other=0.0) * LOG2_E
        raised_M = tl.maximum(highest_M, sinks_M)
        mass_M = mass_M * tl.exp2(highest_M - raised_M) + tl.exp2(sinks_M - raised_M)
        sums *= tl.exp2(highest_M - raised_M)[:, None]
    tl.store(out_ptr, (sums * (v_scale / mass_M)[:, None]).to(out_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _attend(
    q, k_ptr, v_ptr, table_ptr, kv_head, begin, kv_len, tile, end_tile, slopes_M, inner, outer,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, SOFT_CAP: tl.constexpr, ALIBI: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Weighted sums of values, highest scores and masses over a range of tiles."""
    highest_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass_M = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    channels_D, keys_N = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    in_tile = keys_N[:, None] * HEAD_DIM + channels_D[None, :]
    page = page_of(table_ptr, tile, end_tile, BLOCK_N, PAGE)
    for t in range(tile, end_tile):
        next_page = page_of(table_ptr, t + 1, end_tile, BLOCK_N, PAGE)  # a loop variable, so that loads overlap
        positions_N = t * BLOCK_N + keys_N
        visible_N = (positions_N >= begin) & (positions_N < kv_len)
        mask = visible_N[:, None] & (channels_D < HEAD_DIM)[None, :]
        at = ((page.to(tl.int64) * KV_HEADS + kv_head) * PAGE + t * BLOCK_N % PAGE) * HEAD_DIM + in_tile
        k = tl.load(k_ptr + at, mask=mask, other=0.0).to(q.dtype)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = scores_of(products, (positions_N - (kv_len - 1))[None, :], slopes_M, inner, outer, SOFT_CAP, ALIBI)
        scores = tl.where(visible_N[None, :], scores, float("-inf"))
        weights, highest_M, mass_M, decay_M = add_tile(scores, highest_M, mass_M)
        v = tl.load(v_ptr + at, mask=mask, other=0.0).to(q.dtype)
        sums = tl.dot(weights.to(q.dtype), v, sums * decay_M[:, None], input_precision="ieee")
        page = next_page
    return sums, highest_M, mass_M
