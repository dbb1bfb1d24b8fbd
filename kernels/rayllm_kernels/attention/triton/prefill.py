"""Causal attention of several queries a line, by programs that each have some queries of a line with all query heads
that share a key/value head, as rows of one tile. Shape letters: M query rows of a program, N keys of a tile, D head
width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rayllm_kernels.attention.triton.tile import LOG2_E, add_tile, page_of, scores_of


@triton.jit
def line_of(starts_ptr, first_query, num_lines, block, BLOCK_Q: tl.constexpr):
    """The line of this block of BLOCK_Q queries, the block's first query of it, and how many queries the line has.

    A line that begins at query s has the blocks from s // BLOCK_Q + its number on: enough for its queries whatever the
    others have, with at most one block too many a line. So the number of blocks follows from shapes, and a block finds
    its line by bisection.
    """
    low, high = 0, num_lines
    while high - low > 1:
        middle = (low + high) // 2
        start = tl.load(starts_ptr + middle) - first_query
        if start // BLOCK_Q + middle <= block:
            low = middle
        else:
            high = middle
    start = tl.load(starts_ptr + low) - first_query
    return low, start, tl.load(starts_ptr + low + 1) - first_query - start, (block - start // BLOCK_Q - low) * BLOCK_Q


@triton.jit(
    do_not_specialize=("first_query", "num_lines"),
    do_not_specialize_on_alignment=("rows_ptr", "kv_lens_ptr", "starts_ptr"),
)  # they vary from step to step
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, rows_ptr, kv_lens_ptr, starts_ptr, table_ptr, sinks_ptr, slopes_ptr, out_ptr,
    inner, outer, v_scale, window, q_stride, q_head_stride, table_stride, first_query, num_lines,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs (block of queries, key/value head). The last blocks, whose queries see most keys, come first."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    block, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    line, start, num_queries, first = line_of(starts_ptr, first_query, num_lines, block, BLOCK_Q)
    kv_len = tl.load(kv_lens_ptr + line)
    if first >= num_queries or kv_len == 0:
        return
    rows_M, channels_D = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    queries_M, heads_M = first + rows_M // GROUP, kv_head * GROUP + rows_M % GROUP
    kept_M = (rows_M < BLOCK_Q * GROUP) & (queries_M < num_queries)
    kept = kept_M[:, None] & (channels_D < HEAD_DIM)[None, :]
    tokens_M = (start + queries_M).to(tl.int64)
    at = (tokens_M * q_stride + heads_M * q_head_stride)[:, None] + channels_D[None, :]
    q = tl.load(q_ptr + at, mask=kept, other=0.0)
    positions_M = tl.minimum(kv_len - num_queries + queries_M, kv_len - 1)
    slopes_M = tl.load(slopes_ptr + heads_M, mask=kept_M, other=0.0) if ALIBI else 0.0
    highest_M, mass_M = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        highest_M, mass_M = tl.load(sinks_ptr + heads_M, mask=kept_M, other=0.0) * LOG2_E, mass_M + 1
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    table_ptr += tl.load(rows_ptr + line).to(tl.int64) * table_stride
    k_ptr += kv_head * PAGE * HEAD_DIM
    v_ptr += kv_head * PAGE * HEAD_DIM
    position = kv_len - num_queries + first
    begin = tl.maximum(position - window + 1, 0) if WINDOW else 0
    end = tl.minimum(position + BLOCK_Q, kv_len)
    tile, end_tile = begin // BLOCK_N, tl.cdiv(end, BLOCK_N)
    # keys up to the block's first query are seen by all its queries, unless a window hides some
    causal_tile = tile if WINDOW else (position + 1) // BLOCK_N
    for masked in tl.static_range(2):
        first_tile = causal_tile if masked else tile
        last_tile = end_tile if masked else causal_tile
        sums, highest_M, mass_M = _attend(
            q, k_ptr, v_ptr, table_ptr, positions_M, begin, end, first_tile, last_tile, window, slopes_M, inner, outer,
            sums, highest_M, mass_M, KV_HEADS * PAGE * HEAD_DIM, HEAD_DIM, PAGE, masked, WINDOW, SOFT_CAP, ALIBI,
            BLOCK_N, BLOCK_D,
        )  # fmt: skip
    at = (tokens_M * KV_HEADS * GROUP + heads_M)[:, None] * HEAD_DIM + channels_D[None, :]
    tl.store(out_ptr + at, (sums * (v_scale / mass_M)[:, None]).to(out_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _attend(
    q, k_ptr, v_ptr, table_ptr, positions_M, begin, end, tile, end_tile, window, slopes_M, inner, outer,
    sums, highest_M, mass_M, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, ALIBI: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The running softmax with a range of tiles taken in. Where it is not MASKED, every query sees all keys of them."""
    channels_D, keys_N = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    in_tile = keys_N[:, None] * HEAD_DIM + channels_D[None, :]
    page = page_of(table_ptr, tile, end_tile, BLOCK_N, PAGE)
    for t in range(tile, end_tile):
        next_page = page_of(table_ptr, t + 1, end_tile, BLOCK_N, PAGE)  # a loop variable, so that loads overlap
        positions_N = t * BLOCK_N + keys_N
        mask = (channels_D < HEAD_DIM)[None, :]
        if MASKED:
            mask = mask & ((positions_N >= begin) & (positions_N < end))[:, None]
        at = page.to(tl.int64) * BLOCK_SIZE + (t * BLOCK_N % PAGE) * HEAD_DIM + in_tile
        k = tl.load(k_ptr + at, mask=mask, other=0.0).to(q.dtype)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        distances = positions_N[None, :] - positions_M[:, None]
        scores = scores_of(products, distances, slopes_M, inner, outer, SOFT_CAP, ALIBI)
        if MASKED:
            scores = tl.where(distances <= 0, scores, float("-inf"))
        if WINDOW:
            scores = tl.where(distances > -window, scores, float("-inf"))
        weights, highest_M, mass_M, decay_M = add_tile(scores, highest_M, mass_M)
        v = tl.load(v_ptr + at, mask=mask, other=0.0).to(q.dtype)
        sums = tl.dot(weights.to(q.dtype), v, sums * decay_M[:, None], input_precision="ieee")
        page = next_page
    return sums, highest_M, mass_M
