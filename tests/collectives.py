"""What the ranks of a pool run to show a collective's result."""

from __future__ import annotations

import torch

from rayllm.distributed.groups import TensorParallel


def reduce_ranks(tp: TensorParallel) -> tuple[list[float], bool]:
    """The reduced values, and whether they were written in place."""
    x = torch.full((2,), float(tp.rank + 1))
    return tp.all_reduce(x).tolist(), x.tolist() == [3.0, 3.0]


def gather_ranks(tp: TensorParallel) -> list[list[float]]:
    x = torch.arange(4.0).view(2, 2) + 100 * tp.rank
    return tp.all_gather_last(x).tolist()
