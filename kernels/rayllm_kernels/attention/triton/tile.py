"""What the attention kernels do with one tile of scores. Shape letters: M query rows of a program, N keys of a tile.

Scores are kept to the base 2: a softmax of them is one of the natural scores.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def scores_of(products, distances, slopes_M, inner, outer, SOFT_CAP: tl.constexpr, ALIBI: tl.constexpr):
    """Scores `[M, N]` of the products q @ k.T. `inner` and `outer`: see `factors`; `distances` (of any shape that fits)
    are the keys' positions less the queries'."""
    if SOFT_CAP:
        scores = outer - 2 * outer / (tl.exp2(products * inner) + 1)
    else:
        scores = products * inner
    if ALIBI:
        scores += (slopes_M * LOG2_E)[:, None] * distances.to(tl.float32)
    return scores


@triton.jit
def add_tile(scores, highest_M, mass_M):
    """Takes scores, -inf where a row does not see the key, into the running softmax: weights `[M, N]`, the new highest
    scores and masses, and what earlier sums are multiplied by. A row that has seen no key has the highest score -inf
    and the mass 0."""
    raised_M = tl.maximum(highest_M, tl.max(scores, 1))
    base_M = tl.where(raised_M == float("-inf"), 0.0, raised_M)
    weights = tl.exp2(scores - base_M[:, None])
    decay_M = tl.exp2(highest_M - base_M)
    return weights, raised_M, mass_M * decay_M + tl.sum(weights, 1), decay_M


@triton.jit
def page_of(table_ptr, tile, end_tile, BLOCK_N: tl.constexpr, PAGE: tl.constexpr):
    """The block of a tile's keys; 0 where the tile is none of the program's, so that it may be asked for ahead."""
    return tl.load(table_ptr + tile * BLOCK_N // PAGE, mask=tile < end_tile, other=0)


def factors(scale: float, soft_cap: float | None) -> tuple[float, float]:
    """`inner` and `outer` of `scores_of`. c * tanh(x / c) is c - 2c / (exp(2x / c) + 1)."""
    log2_e: float = LOG2_E.value
    if soft_cap is None:
        return scale * log2_e, 0.0
    return 2 * scale / soft_cap * log2_e, soft_cap * log2_e
