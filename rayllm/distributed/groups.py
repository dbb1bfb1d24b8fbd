"""Tensor parallelism as a value that is passed, never looked up: who am I, how many are we, and the collectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from rayllm.distributed.all_reduce import CustomAllReduce

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13 has given it that name


@dataclass(frozen=True)
class TensorParallel:
    """Rank `rank` of `size`, joined by `group`; None is the process's default group, which is another one after a peer
    was replaced. With size 1 every collective is the identity."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    expert_parallel: bool = False
    """A mixture's experts are shared out whole; else each rank holds its share of every expert."""
    custom: CustomAllReduce | None = None
    """Sums messages of some sizes by kernels of its own; None: the group's library (gloo, NCCL) sums all."""
    before_abort: list[Callable[[], None]] = field(default_factory=list)
    """What the thread that computes calls before it leaves its group: whoever holds the group's communicator, as
    recorded CUDA graphs do, adds a function that lets it go. NCCL cannot end a communicator that is held."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`; written in place where ranks are more than one, and returned."""
        if self.size > 1 and not (self.custom is not None and self.custom.reduce(x)):
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather_last(self, x: Tensor) -> Tensor:
        """Every rank's `x` joined along the last dimension, in order of rank; all ranks get the same bits."""
        return x if self.size == 1 else torch.cat(self.all_gather(x).unbind(0), dim=-1)

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's `x`, `[size, ...]` in order of rank; all ranks get the same bits."""
        if self.size == 1:
            return x.unsqueeze(0)
        parts = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        _all_gather(parts.view(-1), x.reshape(-1), group=self.group)
        return parts

    def shard(self, total: int, what: str) -> range:
        """This rank's share of `total` things that must divide evenly (`ValueError` names `what`)."""
        if total % self.size:
            raise ValueError(f"{what}={total} cannot be split evenly over tensor_parallel_size={self.size}")
        width = total // self.size
        return range(self.rank * width, (self.rank + 1) * width)
