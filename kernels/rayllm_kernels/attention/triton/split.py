"""How programs that share one line's keys join what each of them found, in one launch.

Each leaves its sums and raises the line's counter; the one that comes last finds all others' sums, joins them and sets
the counter back to 0. Shape letters: M query rows of a program, V width of a value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_SPLITS = 64
_MAX_KEYS = 32768
_MIN_KEYS = 128
"""Of a program: a shorter part costs more to join than it saves."""


@triton.jit
def part_of(num_tiles, split, num_splits, MIN_TILES: tl.constexpr):
    """The tiles that program number `split` of a line has, as (begin, end), and how many programs have any: lines with
    few tiles are not cut as often as there are programs."""
    per_split = tl.maximum(tl.cdiv(num_tiles, num_splits), MIN_TILES)
    begin = split * per_split
    return begin, tl.minimum(begin + per_split, num_tiles), tl.cdiv(num_tiles, per_split)


@triton.jit
def leave_part(sums, highest_M, mass_M, sums_ptr, masses_ptr, arrivals_ptr, part, kept_M, width, BLOCK_V: tl.constexpr):
    """Leaves the `kept_M` rows of this program's sums as the line's number `part`, and returns how many programs left
    theirs before."""
    rows_M = part * sums.shape[0] + tl.arange(0, sums.shape[0])
    channels_V = tl.arange(0, BLOCK_V)
    kept = kept_M[:, None] & (channels_V < width)[None, :]
    tl.store(sums_ptr + rows_M[:, None] * width + channels_V[None, :], sums, mask=kept)
    tl.store(masses_ptr + 2 * rows_M, highest_M, mask=kept_M)
    tl.store(masses_ptr + 2 * rows_M + 1, mass_M, mask=kept_M)
    tl.debug_barrier()  # all threads' stores come before the one atomic operation, which releases them
    return tl.atomic_add(arrivals_ptr, 1, sem="acq_rel")


@triton.jit
def join_parts(sums_ptr, masses_ptr, num_parts, kept_M, width, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    """The sums, highest scores and masses of all parts together. Several are read at once, as many as registers hold:
    one after another, each would wait for memory."""
    highest_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass_M = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    AT_ONCE: tl.constexpr = 4 if BLOCK_V <= 128 else 2 if BLOCK_V <= 256 else 1
    for part in range(0, num_parts, AT_ONCE):
        a, highest_a, mass_a = _load_part(sums_ptr, masses_ptr, part, num_parts, kept_M, width, BLOCK_M, BLOCK_V)
        if AT_ONCE >= 2:
            b, highest_b, mass_b = _load_part(
                sums_ptr, masses_ptr, part + 1, num_parts, kept_M, width, BLOCK_M, BLOCK_V
            )
        if AT_ONCE == 4:
            c, highest_c, mass_c = _load_part(
                sums_ptr, masses_ptr, part + 2, num_parts, kept_M, width, BLOCK_M, BLOCK_V
            )
            d, highest_d, mass_d = _load_part(
                sums_ptr, masses_ptr, part + 3, num_parts, kept_M, width, BLOCK_M, BLOCK_V
            )
        sums, highest_M, mass_M = _joined(sums, highest_M, mass_M, a, highest_a, mass_a)
        if AT_ONCE >= 2:
            sums, highest_M, mass_M = _joined(sums, highest_M, mass_M, b, highest_b, mass_b)
        if AT_ONCE == 4:
            sums, highest_M, mass_M = _joined(sums, highest_M, mass_M, c, highest_c, mass_c)
            sums, highest_M, mass_M = _joined(sums, highest_M, mass_M, d, highest_d, mass_d)
    return sums, highest_M, mass_M


@triton.jit
def _load_part(sums_ptr, masses_ptr, part, num_parts, kept_M, width, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    """What a program left; nothing where there is no such part. It is read past the first-level cache, which may hold
    what stood there in an earlier launch."""
    rows_M, channels_V = part * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    kept_M = kept_M & (rows_M < num_parts * BLOCK_M)
    kept = kept_M[:, None] & (channels_V < width)[None, :]
    at = sums_ptr + rows_M[:, None] * width + channels_V[None, :]
    sums = tl.load(at, mask=kept, other=0.0, cache_modifier=".cg")
    highest_M = tl.load(masses_ptr + 2 * rows_M, mask=kept_M, other=float("-inf"), cache_modifier=".cg")
    mass_M = tl.load(masses_ptr + 2 * rows_M + 1, mask=kept_M, other=0.0, cache_modifier=".cg")
    return sums, highest_M, mass_M


@triton.jit
def _joined(sums, highest_M, mass_M, part_sums, part_highest_M, part_mass_M):
    raised_M = tl.maximum(highest_M, part_highest_M)
    decay_M, part_decay_M = tl.exp2(highest_M - raised_M), tl.exp2(part_highest_M - raised_M)
    sums = sums * decay_M[:, None] + part_sums * part_decay_M[:, None]
    return sums, raised_M, mass_M * decay_M + part_mass_M * part_decay_M


def parts(num_lines: int, splits: int, num_rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the programs of `num_lines` lines (times key/value heads) leave sums, and highest scores with masses, of
    `num_rows` query rows. A single program a line leaves nothing."""
    num_kept = num_lines * splits * num_rows if splits > 1 else 1
    sums, masses = (torch.empty(num_kept * size, dtype=torch.float32, device=device) for size in (width, 2))
    return sums, masses


def num_splits(num_lines: int, max_keys: int, num_arrivals: int, num_programs: int) -> int:
    """Programs for each of `num_lines` lines (times key/value heads), from shapes alone: enough that the device is
    busy, and that no program has more than `_MAX_KEYS` keys of the longest line that may come."""
    if num_lines > num_arrivals:
        return 1
    wanted = max(num_programs // max(num_lines, 1), -(-max_keys // _MAX_KEYS))
    return max(1, min(wanted, -(-max_keys // _MIN_KEYS), _MAX_SPLITS))
