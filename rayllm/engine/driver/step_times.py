"""How long steps take, by their size, and how long one may take before it counts as a hang. Plain arithmetic."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass

from rayllm.messages import RowParams, StepPlan

MIN_LIMIT_S = 1.0
SLOWEST_FACTOR = 20.0
FIRST_STEPS_S = 2.0
"""Until `_NUM_FIRST_STEPS` are known. Libraries warm up and prompts are long: where all ranks answer, they have
`COMPILING_STEPS_S`."""
COMPILING_STEPS_S = 60.0
"""The same where kernels are compiled and graphs captured, and then for the first steps of each kind: a rank that does
either may not even answer."""
NEW_SIZE_LIMIT_S = 5.0
"""At least, for a plan larger than any before it."""
_NUM_FIRST_STEPS = 8
_NUM_KEPT = 100
_NUM_FIRST_OF_KIND = 2
"""The first one compiles kernels, the second one is captured."""
_NO_RULES = RowParams()


@dataclass(frozen=True, slots=True)
class SentStep:
    """What is remembered of a plan until its result has come."""

    num_tokens: int
    kinds: frozenset[Hashable] = frozenset()
    """What may make workers compile kernels, or capture a graph, where it is new."""


def step_kinds(plan: StepPlan) -> frozenset[Hashable]:
    """Its size, as kernels and graphs tell sizes apart, and for each of its new rows what that asks of the sampler."""
    num_rows = len(plan.rows) // 4
    kinds: set[Hashable] = {(padded_size(plan.num_tokens), num_rows if num_rows < 8 else -(-num_rows // 8) * 8)}
    for start in plan.new_rows:
        names = RowParams.__struct_fields__
        kinds.add(frozenset(name for name in names if getattr(start.params, name) != getattr(_NO_RULES, name)))
    return frozenset(kinds)


def padded_size(num_tokens: int) -> int:
    """A multiple of 16 up to 128 tokens, then one of four sizes for each doubling: as workers pad steps that are not
    decode steps alone (`runner/graphs.py`), and as kernels choose tiles."""
    step = 16 if num_tokens <= 128 else 2 ** ((num_tokens - 1).bit_length() - 3)
    return -(-num_tokens // step) * step


class StepTimes:
    """What is known of the steps so far."""

    def __init__(self, *, compiles: bool = False) -> None:
        """`compiles`: whether workers compile kernels and capture graphs as steps need them."""
        self._compiles = compiles
        self._by_size: dict[int, deque[float]] = {}  # by bits of the number of tokens
        self._num_steps = 0
        self._num_of_kind: Counter[Hashable] = Counter()

    @property
    def are_known(self) -> bool:
        return self._num_steps >= _NUM_FIRST_STEPS

    def sent(self, plan: StepPlan) -> SentStep:
        """What `limit_s` and `note` need of a plan."""
        return SentStep(plan.num_tokens, step_kinds(plan) if self._compiles else frozenset())

    def note(self, step: SentStep, elapsed_s: float) -> None:
        """A step was finished. Times of steps that may have compiled say nothing of later ones."""
        is_new = self._has_new_kind(step)
        self._num_of_kind.update(step.kinds)
        if not is_new:
            self._num_steps += 1
            size = step.num_tokens.bit_length()
            self._by_size.setdefault(size, deque(maxlen=_NUM_KEPT)).append(elapsed_s)

    def forget_kinds(self) -> None:
        """Workers were replaced, or have dropped their graphs: everything is compiled and captured anew."""
        self._num_of_kind.clear()

    def _has_new_kind(self, step: SentStep) -> bool:
        return any(self._num_of_kind[kind] < _NUM_FIRST_OF_KIND for kind in step.kinds)

    @property
    def typical_s(self) -> float | None:
        """The median of the last steps of all sizes; None before the first."""
        latest = [elapsed_s for times in self._by_size.values() for elapsed_s in list(times)[-_NUM_FIRST_STEPS:]]
        return statistics.median(latest) if latest else None

    def limit_s(self, step: SentStep) -> float:
        """Seconds that a step may take: 20 times the slowest of the last hundred of its size (which stands for their
        99th percentile), no less than a second. A larger size than any seen is judged by the largest seen, in
        proportion. One that may compile has `COMPILING_STEPS_S`.
        """
        if not self.are_known:
            return COMPILING_STEPS_S if self._compiles else FIRST_STEPS_S
        limit_s = self._limit_of_size(step.num_tokens.bit_length())
        return max(limit_s, COMPILING_STEPS_S) if self._has_new_kind(step) else limit_s

    def _limit_of_size(self, size: int) -> float:
        as_large = [max(times) for seen, times in self._by_size.items() if seen >= size]
        if as_large:
            own = self._by_size.get(size)
            return max(MIN_LIMIT_S, SLOWEST_FACTOR * (max(own) if own else max(as_large)))
        largest = max(self._by_size)
        slowest_s = max(self._by_size[largest]) * 2 ** (size - largest)
        return max(NEW_SIZE_LIMIT_S, SLOWEST_FACTOR * slowest_s)
