"""A distribution that costs a fraction of a microsecond an observation, and travels between processes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from rayllm.messages import Distribution


class Histogram:
    """Counts values by `edges`: a value belongs to the first edge that is not less than it. One thread writes."""

    __slots__ = ("counts", "edges", "total")

    def __init__(self, edges: Sequence[float]):
        self.edges = edges
        self.counts = [0] * (len(edges) + 1)
        """One for each edge, and one for what is beyond the last."""
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.edges, value)] += 1
        self.total += value

    def snapshot(self) -> Distribution:
        return Distribution(list(self.counts), self.total)
