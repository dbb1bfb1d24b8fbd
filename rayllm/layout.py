"""How the ranks of an engine share one model. Plain Python, importable by all: ranks are counted here alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """`pp` pipeline stages (consecutive layers each) of `tp` ranks, which share every layer of their stage.

    Ranks are numbered stage by stage: rank r is number `r % tp` of stage `r // tp`, so that those that exchange most
    are neighbours.
    """

    tp: int = 1
    """Tensor parallelism: ranks of a stage."""
    pp: int = 1
    """Pipeline parallelism: stages."""
    expert_parallel: bool = False
    """A mixture's experts are shared out whole over a stage's ranks; else each rank holds its share of every expert."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def num_ranks(self) -> int:
        """Worker processes of the engine."""
        return self.tp * self.pp

    @property
    def ranks(self) -> range:
        return range(self.num_ranks)

    @property
    def answering_rank(self) -> int:
        """The rank whose `StepResult` the driver gets: the first of the last stage, where tokens are sampled."""
        return (self.pp - 1) * self.tp

    @property
    def max_inflight_steps(self) -> int:
        """Steps that worker processes hold at once: one in each stage, and one more that waits there, so that no stage
        waits for the driver. Every further one would only add to what a stop token throws away."""
        return self.pp + 1

    def tp_rank(self, rank: int) -> int:
        """The rank's number within its stage."""
        return rank % self.tp

    def stage(self, rank: int) -> int:
        return rank // self.tp
