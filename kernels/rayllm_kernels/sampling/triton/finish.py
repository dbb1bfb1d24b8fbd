"""The last kernel: edges and the draw, one program a row. `draw.py` says what comes before."""

from __future__ import annotations

import triton
import triton.language as tl

from rayllm_kernels.sampling.triton.row import (
    ALL,
    GREEDY,
    LOWEST_KEY,
    TOP_K,
    draw_uniform,
    find_threshold,
    load_logits,
    load_max,
    load_rules,
    order_of,
    target_of,
    top_p_limit,
    weigh,
)


@triton.jit
def _greedy(logits_ptr, row, vocab_size, maxima_ptr, num_tiles, highest, TILES: tl.constexpr, TILE: tl.constexpr):
    """The lowest id with the highest logit."""
    tiles = tl.arange(0, TILES)
    maxima = tl.load(maxima_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=-float("inf"))
    tile = tl.min(tl.where((maxima == highest) & (tiles < num_tiles), tiles, num_tiles - 1))
    ids = tile * TILE + tl.arange(0, TILE)
    logits = load_logits(logits_ptr, row, vocab_size, ids, ids < vocab_size)
    return tl.min(tl.where((logits == highest) & (ids < vocab_size), ids, vocab_size - 1))


@triton.jit
def _draw_of_all(
    logits_ptr,
    row,
    vocab_size,
    sums_ptr,
    highest,
    scale,
    min_p,
    uniform,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """First the split on which the uniform number falls, then the id in it."""
    splits = tl.arange(0, SPLITS)
    sums = tl.load(sums_ptr + (row * SPLITS + splits) * PIVOTS + PIVOTS - 1)
    ends = tl.cumsum(sums, axis=0)
    target = target_of(tl.sum(sums), uniform)
    split = tl.min(tl.where(ends > target, splits, SPLITS - 1))
    target -= tl.sum(tl.where(splits < split, sums, 0))
    token_id, begin = vocab_size - 1, split * SPLIT
    before = target * 0
    while begin < (split + 1) * SPLIT:
        ids = begin + tl.arange(0, 2048)
        logits = load_logits(logits_ptr, row, vocab_size, ids, (ids < (split + 1) * SPLIT) & (ids < vocab_size))
        ends_of_ids = before + tl.cumsum(weigh(logits, highest, scale, min_p), axis=0)
        token_id = tl.minimum(token_id, tl.min(tl.where(ends_of_ids > target, ids, vocab_size - 1)))
        before = tl.max(ends_of_ids)
        begin += 2048
    return token_id


@triton.jit
def _edge_of_collected(keys, parts, limit, low, high):
    """The highest key from which on the parts sum up to the limit."""
    while low < high:
        middle = low + (high - low + 1) // 2
        if tl.sum(tl.where(keys >= middle, parts, 0)) >= limit:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _draw_of_collected(ids, keys, weights, numbers_ptr, row, num_rows, kind, low, highest, mass, uniform):
    """`low`: a logit at or below what is kept. `mass`: all weights, which top-p takes a part of without a top-k."""
    edge, high = order_of(low).to(tl.int64), order_of(highest).to(tl.int64)
    if kind == TOP_K:
        top_k = tl.load(numbers_ptr + 2 * num_rows + row).to(tl.int64)
        edge = _edge_of_collected(keys, (keys > LOWEST_KEY).to(tl.int64), top_k, edge, high)
        mass = tl.sum(tl.where(keys >= edge, weights, 0))
    edge = _edge_of_collected(keys, weights, top_p_limit(numbers_ptr, row, num_rows, mass), edge, high)
    ends = tl.cumsum(tl.where(keys >= edge, weights, 0), axis=0)
    target = target_of(tl.max(ends), uniform)
    return tl.min(tl.where((ends > target) & (keys > LOWEST_KEY), ids, 0x7FFFFFFF))


@triton.jit
def _sum_of_row(logits_ptr, row, vocab_size, edge, highest, scale, min_p, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """The weight, or the number, of a row's tokens with a key from `edge` up."""
    sums = tl.zeros((BLOCK,), tl.int64)
    for begin in range(0, vocab_size, BLOCK):
        ids = begin + tl.arange(0, BLOCK)
        logits = load_logits(logits_ptr, row, vocab_size, ids, ids < vocab_size)
        if COUNTS:
            parts = (logits > -float("inf")).to(tl.int64)
        else:
            parts = weigh(logits, highest, scale, min_p)
        sums += tl.where(order_of(logits) >= edge, parts, 0)
    return tl.sum(sums)


@triton.jit
def _edge_of_row(
    logits_ptr, row, vocab_size, limit, low, high, highest, scale, min_p, COUNTS: tl.constexpr, BLOCK: tl.constexpr
):
    while low < high:
        middle = low + (high - low + 1) // 2
        if _sum_of_row(logits_ptr, row, vocab_size, middle, highest, scale, min_p, COUNTS, BLOCK) >= limit:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _draw_of_row(
    logits_ptr, row, vocab_size, numbers_ptr, num_rows, kind, low, highest, mass, uniform, BLOCK: tl.constexpr
):
    """`_draw_of_collected` of all ids."""
    scale, min_p = load_rules(numbers_ptr, row, num_rows)
    edge, high = order_of(low).to(tl.int64), order_of(highest).to(tl.int64)
    if kind == TOP_K:
        top_k = tl.load(numbers_ptr + 2 * num_rows + row).to(tl.int64)
        edge = _edge_of_row(logits_ptr, row, vocab_size, top_k, edge, high, highest, scale, min_p, True, BLOCK)
        mass = _sum_of_row(logits_ptr, row, vocab_size, edge, highest, scale, min_p, False, BLOCK)
    limit = top_p_limit(numbers_ptr, row, num_rows, mass)
    edge = _edge_of_row(logits_ptr, row, vocab_size, limit, edge, high, highest, scale, min_p, False, BLOCK)
    total = _sum_of_row(logits_ptr, row, vocab_size, edge, highest, scale, min_p, False, BLOCK)
    target, before = target_of(total, uniform), total * 0
    token_id = vocab_size - 1
    for begin in range(0, vocab_size, BLOCK):
        ids = begin + tl.arange(0, BLOCK)
        logits = load_logits(logits_ptr, row, vocab_size, ids, ids < vocab_size)
        kept = tl.where(order_of(logits) >= edge, weigh(logits, highest, scale, min_p), 0)
        ends = before + tl.cumsum(kept, axis=0)
        token_id = tl.minimum(token_id, tl.min(tl.where(ends > target, ids, vocab_size - 1)))
        before = tl.max(ends)
    return token_id


@triton.jit(do_not_specialize=["num_rows"])
def finish(
    logits_ptr,
    vocab_size,
    num_rows,
    keys_ptr,
    numbers_ptr,
    maxima_ptr,
    num_tiles,
    pivots_ptr,
    sums_ptr,
    collected_ptr,
    num_collected_ptr,
    rows_ptr,
    last_token_ptr,
    is_bound_ptr,
    token_ids_ptr,
    flags_ptr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    PIVOTS: tl.constexpr,
    TILES: tl.constexpr,
    ROOM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    kind = tl.load(keys_ptr + row)
    highest = load_max(maxima_ptr, row, num_tiles, TILES)
    is_finite = (highest > -float("inf")) & (highest < float("inf"))
    token_id = _greedy(logits_ptr, row, vocab_size, maxima_ptr, num_tiles, highest, TILES, TILE)
    if is_finite & (kind != GREEDY):
        scale, min_p = load_rules(numbers_ptr, row, num_rows)
        uniform = draw_uniform(keys_ptr, row, num_rows)
        if kind == ALL:
            token_id = _draw_of_all(
                logits_ptr, row, vocab_size, sums_ptr, highest, scale, min_p, uniform, SPLIT, SPLITS, PIVOTS
            )
        else:
            low, mass = find_threshold(numbers_ptr, row, num_rows, kind, pivots_ptr, sums_ptr, SPLITS, PIVOTS)
            at = tl.arange(0, SPLITS * ROOM)
            numbers = tl.load(num_collected_ptr + row * SPLITS + at // ROOM)
            if tl.max(numbers) <= ROOM:
                is_there = at % ROOM < numbers
                ids = tl.load(collected_ptr + row * SPLITS * ROOM + at, mask=is_there, other=0)
                logits = load_logits(logits_ptr, row, vocab_size, ids, is_there)
                parts = tl.where(is_there, weigh(logits, highest, scale, min_p), 0)
                token_id = _draw_of_collected(
                    ids, order_of(logits), parts, numbers_ptr, row, num_rows, kind, low, highest, mass, uniform
                )
            else:
                token_id = _draw_of_row(
                    logits_ptr, row, vocab_size, numbers_ptr, num_rows, kind, low, highest, mass, uniform, BLOCK
                )
    is_stuck = (highest == -float("inf")) & (tl.load(is_bound_ptr + row) != 0)
    tl.store(token_ids_ptr + row, token_id.to(tl.int64))
    tl.store(last_token_ptr + tl.load(rows_ptr + row), token_id.to(tl.int64))
    tl.store(flags_ptr + row, (is_finite | is_stuck).to(tl.uint8))
    tl.store(flags_ptr + num_rows + row, is_stuck.to(tl.uint8))
