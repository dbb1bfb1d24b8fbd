"""Attention of query heads to latents, for one query a line and for several. Shape letters: M query rows of a program,
N tokens of a tile, C width of a latent, R of the rotated key behind it, W = C + R.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rayllm_kernels.attention.triton.prefill import line_of
from rayllm_kernels.attention.triton.split import join_parts, leave_part, part_of
from rayllm_kernels.attention.triton.tile import add_tile, page_of, scores_of


@triton.jit(do_not_specialize_on_alignment=("rows_ptr", "kv_lens_ptr"))  # they begin at any line
def latent_decode_kernel(
    q_ptr, cache_ptr, rows_ptr, kv_lens_ptr, table_ptr, out_ptr, sums_ptr, masses_ptr, arrivals_ptr,
    factor, q_stride, q_head_stride, table_stride,
    HEADS: tl.constexpr, LATENT: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    MIN_TILES: tl.constexpr,
):  # fmt: skip
    """Programs (line, tile of heads, part of the tokens)."""
    line, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    heads_M, channels_C = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    kept_M = heads_M < HEADS
    kept = kept_M[:, None] & (channels_C < LATENT)[None, :]
    out_ptr += (line * HEADS + heads_M[:, None]) * LATENT + channels_C[None, :]
    kv_len = tl.load(kv_lens_ptr + line)
    tile, end_tile, num_parts = part_of(tl.cdiv(kv_len, BLOCK_N), split, tl.num_programs(2), MIN_TILES)
    if tile >= end_tile:
        if split == 0:  # a line without keys
            tl.store(out_ptr, tl.zeros([BLOCK_M, BLOCK_C], out_ptr.dtype.element_ty), mask=kept)
        return
    rows_ptr_M = q_ptr + line * q_stride + heads_M * q_head_stride
    table_ptr += tl.load(rows_ptr + line).to(tl.int64) * table_stride
    last_M = tl.full([BLOCK_M], 0, tl.int32) + kv_len - 1
    sums, highest_M, mass_M = _attend(
        rows_ptr_M, kept_M, cache_ptr, table_ptr, last_M, kv_len, tile, end_tile, factor,
        LATENT, WIDTH, PAGE, BLOCK_M, BLOCK_N, BLOCK_C, BLOCK_R,
    )  # fmt: skip
    if num_parts > 1:
        line_and_tile = line * tl.num_programs(1) + tl.program_id(1)
        sums_ptr += line_and_tile * tl.num_programs(2) * BLOCK_M * LATENT
        masses_ptr += line_and_tile * tl.num_programs(2) * BLOCK_M * 2
        arrivals_ptr += line_and_tile
        num_before = leave_part(
            sums, highest_M, mass_M, sums_ptr, masses_ptr, arrivals_ptr, split, kept_M, LATENT, BLOCK_C
        )
        if num_before + 1 < num_parts:
            return
        tl.store(arrivals_ptr, 0)
        sums, highest_M, mass_M = join_parts(sums_ptr, masses_ptr, num_parts, kept_M, LATENT, BLOCK_M, BLOCK_C)
    tl.store(out_ptr, (sums / mass_M[:, None]).to(out_ptr.dtype.element_ty), mask=kept)


@triton.jit(
    do_not_specialize=("first_query", "num_lines"),
    do_not_specialize_on_alignment=("rows_ptr", "kv_lens_ptr", "starts_ptr"),
)  # they vary from step to step
def latent_prefill_kernel(
    q_ptr, cache_ptr, rows_ptr, kv_lens_ptr, starts_ptr, table_ptr, out_ptr,
    factor, q_stride, q_head_stride, table_stride, first_query, num_lines,
    HEADS: tl.constexpr, LATENT: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Programs (block of queries, tile of heads): all heads of BLOCK_Q queries, or some of one."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last queries see most, and come first
    line, start, num_queries, first = line_of(starts_ptr, first_query, num_lines, block, BLOCK_Q)
    kv_len = tl.load(kv_lens_ptr + line)
    if first >= num_queries or kv_len == 0:
        return
    rows_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    queries_M, heads_M = first + rows_M // HEADS, rows_M % HEADS
    kept_M = (rows_M < BLOCK_Q * HEADS) & (queries_M < num_queries)
    tokens_M = (start + queries_M).to(tl.int64)
    rows_ptr_M = q_ptr + tokens_M * q_stride + heads_M * q_head_stride
    table_ptr += tl.load(rows_ptr + line).to(tl.int64) * table_stride
    positions_M = tl.minimum(kv_len - num_queries + queries_M, kv_len - 1)
    end = tl.minimum(kv_len - num_queries + first + BLOCK_Q, kv_len)
    sums, _, mass_M = _attend(
        rows_ptr_M, kept_M, cache_ptr, table_ptr, positions_M, end, 0, tl.cdiv(end, BLOCK_N), factor,
        LATENT, WIDTH, PAGE, BLOCK_M, BLOCK_N, BLOCK_C, BLOCK_R,
    )  # fmt: skip
    channels_C = tl.arange(0, BLOCK_C)
    at = (tokens_M * HEADS + heads_M)[:, None] * LATENT + channels_C[None, :]
    kept = kept_M[:, None] & (channels_C < LATENT)[None, :]
    tl.store(out_ptr + at, (sums / mass_M[:, None]).to(out_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _attend(
    rows_ptr_M, kept_M, cache_ptr, table_ptr, positions_M, end, tile, end_tile, factor,
    LATENT: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Weighted sums of latents, highest scores and masses over a range of tiles."""
    channels_C, channels_R, tokens_N = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    of_latent_C, of_key_R = channels_C < LATENT, channels_R < WIDTH - LATENT
    q_c = tl.load(rows_ptr_M[:, None] + channels_C, mask=kept_M[:, None] & of_latent_C[None, :], other=0.0)
    q_r = tl.load(rows_ptr_M[:, None] + LATENT + channels_R, mask=kept_M[:, None] & of_key_R[None, :], other=0.0)
    highest_M, mass_M = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    page = page_of(table_ptr, tile, end_tile, BLOCK_N, PAGE)
    for t in range(tile, end_tile):
        next_page = page_of(table_ptr, t + 1, end_tile, BLOCK_N, PAGE)  # a loop variable, so that loads overlap
        positions_N = t * BLOCK_N + tokens_N
        written_N = (positions_N < end)[:, None]
        at = cache_ptr + (page.to(tl.int64) * PAGE + t * BLOCK_N % PAGE) * WIDTH + tokens_N[:, None] * WIDTH
        latents = tl.load(at + channels_C[None, :], mask=written_N & of_latent_C[None, :], other=0.0)
        keys = tl.load(at + LATENT + channels_R[None, :], mask=written_N & of_key_R[None, :], other=0.0)
        products = tl.dot(q_c, tl.trans(latents), input_precision="ieee")
        products = tl.dot(q_r, tl.trans(keys), products, input_precision="ieee")
        distances = positions_N[None, :] - positions_M[:, None]
        scores = tl.where(distances <= 0, scores_of(products, distances, 0.0, factor, 0.0, False, False), float("-inf"))
        weights, highest_M, mass_M, decay_M = add_tile(scores, highest_M, mass_M)
        sums = tl.dot(weights.to(q_c.dtype), latents, sums * decay_M[:, None], input_precision="ieee")
        page = next_page
    return sums, highest_M, mass_M
