"""Sums over inputs that several programs share, joined in one launch in the order of the parts, so that the result does
not depend on which program comes last. Shape letters: M tokens of a program, N outputs of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

_PROGRAMS = 528
"""Wanted for few tokens: four for each multiprocessor of an H100 or H200."""
_MIN_TILES = 4
"""Of a program: a shorter part costs more to join than it saves."""


def num_splits(num_blocks: int, num_tiles: int) -> int:
    """Programs for each of `num_blocks` blocks of outputs whose inputs are `num_tiles` tiles; at least 1."""
    return max(min(_PROGRAMS // num_blocks, num_tiles // _MIN_TILES), 1)


@triton.jit
def leave_part(sums, parts_ptr, arrivals_ptr, block, split, BLOCKS: tl.constexpr):
    """Leaves a part of a block's sums, `[N, M]`, and returns how many programs left theirs before."""
    size: tl.constexpr = sums.shape[0] * sums.shape[1]
    at = tl.arange(0, sums.shape[1])[None, :] * sums.shape[0] + tl.arange(0, sums.shape[0])[:, None]
    tl.store(parts_ptr + (split * BLOCKS + block) * size + at, sums)
    tl.debug_barrier()  # all threads' stores come before the one atomic operation, which releases them
    return tl.atomic_add(arrivals_ptr + block, 1, sem="acq_rel")


@triton.jit
def join_parts(
    parts_ptr, arrivals_ptr, block, BLOCKS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sum of all parts of a block, whose counter is 0 again."""
    tl.store(arrivals_ptr + block, 0)
    at = tl.arange(0, BLOCK_M)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for split in range(SPLITS):  # past the first-level cache, which may hold what stood there in an earlier launch
        part_ptr = parts_ptr + (split * BLOCKS + block) * (BLOCK_N * BLOCK_M)
        sums += tl.load(part_ptr + at, cache_modifier=".cg")
    return sums
