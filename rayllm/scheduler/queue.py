"""Sequences in order of service."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import pairwise
from operator import attrgetter

from rayllm.scheduler.sequence import Sequence

_order = attrgetter("order")
_priority = attrgetter("priority")


class ServiceQueue(list[Sequence]):
    """A list of sequences kept in order of priority, then arrival. A preempted sequence finds its old place
    again."""

    def add(self, sequence: Sequence) -> None:
        self.insert(bisect_left(self, sequence.order, key=_order), sequence)

    def remove(self, sequence: Sequence) -> None:
        """`ValueError` where it is not in the queue."""
        index = bisect_left(self, sequence.order, key=_order)
        if index == len(self) or self[index] is not sequence:
            raise ValueError(f"{sequence} is not in the queue")
        del self[index]

    def lower_than(self, priority: int) -> list[Sequence]:
        """Those of lower priority, which is a higher number: they stand at the end."""
        return self[bisect_right(self, priority, key=_priority) :]

    def check(self) -> None:
        assert all(a.order < b.order for a, b in pairwise(self)), "the queue is out of order"
