"""`reference.sample` in two launches where all rows are greedy, three where none has a top-k or top-p, else in five.

The ids of a row are cut into tiles, and those into splits, each of which is one program's:

1. `_find_maxima`: the highest logit of each tile.
2. `_choose_pivots`: of each row, every power of two's highest of those maxima.
3. `_add_up`: the weight, or with top-k the number, of the tokens from each pivot up.
4. `_collect`: the ids from the highest pivot up that holds all that top-k and top-p keep: few more than those.
5. `finish`, one program a row: finds the edges among these by halving the range of the logits' bits, and draws. Where
   more ids were collected than there is room for, it reads the whole row at each halving: slower, but the same.

Weights are whole numbers and their sums exact, so only the exponential could differ from the reference's. Both compute
the same polynomial by the same fused operations: that of SLEEF's exp2 (Shibata and Petrogalli, "SLEEF: A Portable
Vectorized Library of C Standard Mathematical Functions", 2020), which is what torch's vector loops call. So kernels
that weigh are compiled without the fusion of other operations. NaN counts as +infinity: the row is not usable then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.launch import launch
from rayllm_kernels.sampling.reference import Draw, Group
from rayllm_kernels.sampling.triton.finish import finish
from rayllm_kernels.sampling.triton.row import (
    ALL,
    GREEDY,
    TOP_K,
    TOP_P,
    find_threshold,
    load_logits,
    load_max,
    load_rules,
    weigh,
)

_MAX_SPLITS = 16
_MIN_SPLIT = 4096
"""Ids that are worth a program."""
_NUM_COLLECTED = 256
"""For how many ids of a split there is room."""
_NUM_PIVOTS = 16
"""The last of them is -infinity."""
_MAX_TILES = 1024


def sample(
    logits_NV: Tensor,
    keys_4N: Tensor,
    numbers_4N: Tensor,
    groups: Sequence[Group],
    rows_N: Tensor,
    last_token_M: Tensor,
    is_bound_N: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.sample`."""
    num_rows, vocab_size = logits_NV.shape
    assert logits_NV.is_contiguous()
    device = logits_NV.device
    tile = max(16, triton.next_power_of_2(vocab_size) // _MAX_TILES)
    num_tiles = triton.cdiv(vocab_size, tile)
    num_splits = min(_MAX_SPLITS, triton.next_power_of_2(triton.cdiv(vocab_size, _MIN_SPLIT)))
    split_tiles = triton.cdiv(num_tiles, num_splits)
    maxima = torch.empty((num_rows, num_tiles), dtype=torch.float32, device=device)
    pivots = torch.empty((num_rows, _NUM_PIVOTS), dtype=torch.float32, device=device)
    sums = torch.empty((num_rows, num_splits, _NUM_PIVOTS), dtype=torch.int64, device=device)
    collected = torch.empty((num_rows, num_splits, _NUM_COLLECTED), dtype=torch.int32, device=device)
    num_collected = torch.empty((num_rows, num_splits), dtype=torch.int32, device=device)
    token_ids_N = torch.empty(num_rows, dtype=torch.int64, device=device)
    flags_2N = torch.empty((2, num_rows), dtype=torch.uint8, device=device)

    kinds = {group.draw for group in groups}
    splits = (num_rows, num_splits)
    row = (logits_NV, vocab_size, num_rows, keys_4N, numbers_4N, maxima, num_tiles)
    split = {"SPLIT": split_tiles * tile, "SPLITS": num_splits, "PIVOTS": _NUM_PIVOTS}
    tiles = {"TILES": triton.next_power_of_2(num_tiles), "enable_fp_fusion": False}
    shape = {"TILE": tile, "SPLIT_TILES": split_tiles, "BLOCK": max(1, 2048 // tile)}
    launch(_find_maxima, splits, logits_NV, vocab_size, maxima, num_tiles, **shape, num_warps=4)
    if kinds != {Draw.GREEDY}:
        if not kinds <= {Draw.GREEDY, Draw.ALL}:
            launch(_choose_pivots, (num_rows,), maxima, num_tiles, pivots, PIVOTS=_NUM_PIVOTS, TILES=tiles["TILES"])
        launch(_add_up, splits, *row, pivots, sums, **split, **tiles, BLOCK=512, num_warps=8)
        if not kinds <= {Draw.GREEDY, Draw.ALL}:
            found = (collected, num_collected)
            room = {"ROOM": _NUM_COLLECTED, "BLOCK": 1024, "num_warps": 4}
            launch(_collect, splits, *row[:5], pivots, sums, *found, **split, **room)
    out = (rows_N, last_token_M, is_bound_N, token_ids_N, flags_2N)
    room = {"ROOM": _NUM_COLLECTED, "TILE": tile, "BLOCK": 4096, "num_warps": 8}
    launch(finish, (num_rows,), *row, pivots, sums, collected, num_collected, *out, **split, **tiles, **room)
    is_usable_N, is_stuck_N = flags_2N.view(torch.bool)
    return token_ids_N, is_usable_N, is_stuck_N


@triton.jit
def _find_maxima(
    logits_ptr,
    vocab_size,
    maxima_ptr,
    num_tiles,
    TILE: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, split = tl.program_id(0), tl.program_id(1)
    for begin in range(0, SPLIT_TILES, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        tiles = split * SPLIT_TILES + place
        ids = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
        logits = load_logits(logits_ptr, row, vocab_size, ids, (place < SPLIT_TILES)[:, None] & (ids < vocab_size))
        is_mine = (place < SPLIT_TILES) & (tiles < num_tiles)
        tl.store(maxima_ptr + row * num_tiles + tiles, tl.max(logits, axis=1), mask=is_mine)


@triton.jit
def _choose_pivots(maxima_ptr, num_tiles, pivots_ptr, PIVOTS: tl.constexpr, TILES: tl.constexpr):
    row = tl.program_id(0)
    tiles = tl.arange(0, TILES)
    maxima = tl.load(maxima_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=-float("inf"))
    falling = tl.sort(maxima, descending=True)
    for pivot in tl.static_range(PIVOTS):
        value = tl.max(tl.where(tiles == 2**pivot - 1, falling, -float("inf")))
        tl.store(pivots_ptr + row * PIVOTS + pivot, value)


@triton.jit(do_not_specialize=["num_rows"])
def _add_up(
    logits_ptr,
    vocab_size,
    num_rows,
    keys_ptr,
    numbers_ptr,
    maxima_ptr,
    num_tiles,
    pivots_ptr,
    sums_ptr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    PIVOTS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, split = tl.program_id(0), tl.program_id(1)
    kind = tl.load(keys_ptr + row)
    if kind != GREEDY:
        scale, min_p = load_rules(numbers_ptr, row, num_rows)
        highest = load_max(maxima_ptr, row, num_tiles, TILES)
        pivot = tl.arange(0, PIVOTS)
        num_pivots = tl.where(kind == ALL, 0, PIVOTS)  # then only the sum of all is wanted, and none were chosen
        pivots = tl.load(pivots_ptr + row * PIVOTS + pivot, mask=pivot < num_pivots, other=-float("inf"))
        sums = tl.zeros((PIVOTS,), tl.int64)
        for begin in range(0, SPLIT, BLOCK):
            ids = split * SPLIT + begin + tl.arange(0, BLOCK)
            logits = load_logits(logits_ptr, row, vocab_size, ids, (ids < (split + 1) * SPLIT) & (ids < vocab_size))
            parts = weigh(logits, highest, scale, min_p)
            if kind == TOP_K:
                parts = (logits > -float("inf")).to(tl.int64)
            sums += tl.sum(tl.where(logits[:, None] >= pivots[None, :], parts[:, None], 0), axis=0)
        tl.store(sums_ptr + (row * SPLITS + split) * PIVOTS + pivot, sums)


@triton.jit(do_not_specialize=["num_rows"])
def _collect(
    logits_ptr,
    vocab_size,
    num_rows,
    keys_ptr,
    numbers_ptr,
    pivots_ptr,
    sums_ptr,
    collected_ptr,
    num_collected_ptr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    PIVOTS: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, split = tl.program_id(0), tl.program_id(1)
    kind = tl.load(keys_ptr + row)
    if kind >= TOP_P:
        threshold, _ = find_threshold(numbers_ptr, row, num_rows, kind, pivots_ptr, sums_ptr, SPLITS, PIVOTS)
        num = 0
        for begin in range(0, SPLIT, BLOCK):
            ids = split * SPLIT + begin + tl.arange(0, BLOCK)
            logits = load_logits(logits_ptr, row, vocab_size, ids, (ids < (split + 1) * SPLIT) & (ids < vocab_size))
            is_found = ((logits >= threshold) & (logits > -float("inf"))).to(tl.int32)
            place = num + tl.cumsum(is_found, axis=0) - 1
            target = collected_ptr + (row * SPLITS + split) * ROOM + place
            tl.store(target, ids, mask=(is_found != 0) & (place < ROOM))
            num += tl.sum(is_found)
        tl.store(num_collected_ptr + row * SPLITS + split, num)
