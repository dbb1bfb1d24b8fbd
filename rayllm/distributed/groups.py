"""Tensor parallelism as a value that is passed, never looked up: who am I, how many are we, and the collectives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TensorParallel:
    """Rank `rank` of `size`, joined by `group`; None is the process's default group, which is another one after a peer
    was replaced. With size 1 every collective is the identity."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    expert_parallel: bool = False
    """A mixture's experts are shared out whole; else each rank holds its share of every expert."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`; written in place where ranks are more than one, and returned."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather_last(self, x: Tensor) -> Tensor:
        """Every rank's `x` joined along the last dimension, in order of rank; all ranks get the same bits."""
        if self.size == 1:
            return x
        parts = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        dist.all_gather(list(parts.unbind(0)), x.contiguous(), group=self.group)
        return torch.cat(parts.unbind(0), dim=-1)

    def shard(self, total: int, what: str) -> range:
        """This rank's share of `total` things that must divide evenly (`ValueError` names `what`)."""
        if total % self.size:
            raise ValueError(f"{what}={total} cannot be split evenly over tensor_parallel_size={self.size}")
        width = total // self.size
        return range(self.rank * width, (self.rank + 1) * width)
