"""The plans that a rank has and has not answered: launched ahead where the device computes on its own, finished in
order."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from rayllm.messages import StepPlan, StepResult


class StepRunner(Protocol):
    """What an executor needs of `rayllm.runner.runner.Runner`."""

    @property
    def max_launched_steps(self) -> int:
        """Steps that may be launched and not finished: 1 where `launch` or `finish` computes, 2 where the device does
        while the host goes on."""

    def num_blocks_available(self) -> int:
        """Asked once, when all ranks have joined, and of all of them together: they may compute a step."""

    def start(self, num_blocks: int) -> None:
        """Allocates the KV pool when first called; begins with no rows every time."""

    def warm_up(self) -> None: ...

    def may_launch_ahead(self, plan: StepPlan) -> bool:
        """Whether the plan may be launched while the one before it is not finished."""

    def launch(self, plan: StepPlan) -> Any: ...

    def is_done(self, launched: Any) -> bool:
        """Whether `finish` would not wait. Never waits itself."""

    def finish(self, launched: Any) -> StepResult: ...


@dataclass(frozen=True, slots=True)
class FinishedStep:
    plan: StepPlan
    result: StepResult
    launched_at: float
    """By `time.monotonic`."""


@dataclass(frozen=True, slots=True)
class _Launched:
    plan: StepPlan
    step: Any
    launched_at: float
    error: Exception | None = None
    """What `launch` raised: raised when it is this plan's turn, as those before it may be fine."""


class StepPipeline:
    """Plans in, results out, in the same order. Where a runner computes in `launch` or `finish`, a plan is launched
    when its result is asked for, else as soon as it may be."""

    def __init__(self, runner: StepRunner):
        self._runner = runner
        self._launches_ahead = runner.max_launched_steps > 1
        self._waiting: deque[StepPlan] = deque()
        self._launched: deque[_Launched] = deque()

    def __len__(self) -> int:
        """Plans that are not finished."""
        return len(self._waiting) + len(self._launched)

    def add(self, plan: StepPlan) -> None:
        """Launches the plan if it may be. Raises nothing: `finish` does."""
        self._waiting.append(plan)
        self.launch_ahead()

    def launch_ahead(self) -> None:
        """Launches those plans that may be by now: to be called after each `finish`. Raises nothing."""
        launched = self._launched
        while self._launches_ahead and self._waiting and len(launched) < self._runner.max_launched_steps:
            if launched and (launched[-1].error is not None or not self._runner.may_launch_ahead(self._waiting[0])):
                return
            self._launch(self._waiting.popleft())

    @property
    def may_launch_more(self) -> bool:
        """Whether another plan would be welcome before the oldest is finished."""
        return self._launches_ahead and not self._waiting and len(self._launched) < self._runner.max_launched_steps

    @property
    def is_done(self) -> bool:
        """Whether the oldest plan, which was launched, is computed."""
        oldest = self._launched[0]
        return oldest.error is not None or self._runner.is_done(oldest.step)

    def finish(self) -> FinishedStep:
        """The oldest plan's result. Raises what its launch or its finish raised."""
        assert self, "no plan was added"
        if not self._launched:
            self._launch(self._waiting.popleft())
        oldest = self._launched.popleft()
        if oldest.error is not None:
            raise oldest.error
        return FinishedStep(oldest.plan, self._runner.finish(oldest.step), oldest.launched_at)

    def clear(self) -> None:
        """Forgets all plans; what the device computes of them has no reader."""
        self._waiting.clear()
        self._launched.clear()

    def _launch(self, plan: StepPlan) -> None:
        launched_at = time.monotonic()
        try:
            launched = _Launched(plan, self._runner.launch(plan), launched_at)
        except Exception as error:
            launched = _Launched(plan, None, launched_at, error)
        self._launched.append(launched)
