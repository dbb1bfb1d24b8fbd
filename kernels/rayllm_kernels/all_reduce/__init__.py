"""All-reduce between GPUs that reach each other's memory: each rank's kernel reads the others' values itself.

On a CPU ranks reduce by gloo. `reference.all_reduce` says what the sum is.
"""

from __future__ import annotations

from rayllm_kernels.all_reduce.peers import MAX_PROGRAMS, Peers, shared_bytes

__all__ = ["MAX_PROGRAMS", "Peers", "one_shot", "shared_bytes", "two_shot"]

from torch import Tensor


def one_shot(x: Tensor, peers: Peers) -> None:
    """Sums `x` over all ranks, in place: every rank reads all of every other rank's values. The fewest waits."""
    from rayllm_kernels.all_reduce.triton import one_shot as implementation

    implementation(x, peers)


def two_shot(x: Tensor, peers: Peers) -> None:
    """The same: every rank sums its share of the values, and then reads the others' sums. The fewest bytes."""
    from rayllm_kernels.all_reduce.triton import two_shot as implementation

    implementation(x, peers)
