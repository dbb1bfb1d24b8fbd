"""The memory through which the ranks of an all-reduce reach each other.

Each rank has one block of memory that all ranks have mapped. It begins with flags, int64 `[2, MAX_PROGRAMS, size]`: in
`[stage, program, peer]` a peer writes the number of the call in which its program has come so far. Two areas of
`capacity_bytes` follow, for the values of even and of odd calls: a rank that begins call n has ended call n - 1, for
which every peer has begun it too and so has ended n - 2, whose area call n overwrites.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MAX_PROGRAMS = 128
"""Programs of a launch. They wait for each other across GPUs, so all must run at once."""
_FLAG_BYTES = 8


@dataclass(frozen=True)
class Peers:
    """One rank's view of the memory that `size` ranks share."""

    rank: int
    size: int
    capacity_bytes: int
    """The longest message; a multiple of 16."""
    addresses_W: Tensor
    """int64 `[size]`: where each rank's block is in this process's address space. Zero at first are its flags."""
    calls: Tensor
    """int64 `[2]`, this rank's own, zero at first: calls so far, and programs of the present one that have ended. On
    the device, so that a recorded graph counts each of its replays."""
    abort: Tensor
    """int32 `[1]` that the device can read and another thread of the host can set (pinned): other than 0, no kernel
    waits any longer, and results are worth nothing."""


def flags_bytes(size: int) -> int:
    return 2 * MAX_PROGRAMS * size * _FLAG_BYTES


def shared_bytes(size: int, capacity_bytes: int) -> int:
    """Bytes of each rank's block."""
    return flags_bytes(size) + 2 * capacity_bytes
