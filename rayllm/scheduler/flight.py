"""Plans on their way: in the making, and out at the workers."""

from __future__ import annotations

from dataclasses import dataclass, field

from rayllm.messages import RowStart
from rayllm.scheduler.sequence import Sequence


@dataclass(slots=True)
class Draft:
    """A plan in the making. A sequence preempted meanwhile is taken out again."""

    budget: int
    counts: dict[Sequence, int] = field(default_factory=dict)
    grown: dict[Sequence, list[int]] = field(default_factory=dict)
    starts: list[RowStart] = field(default_factory=list)


@dataclass(slots=True)
class Flight:
    """A plan that is out: what its result will be matched with."""

    step: int
    by_row: dict[int, Sequence]
    num_samples: int
    filled: list[tuple[Sequence, int]]
    """Sequences for which the step may fill blocks, and how many tokens then have KV."""
