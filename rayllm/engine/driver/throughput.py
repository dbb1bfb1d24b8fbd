"""Estimates how long waiting requests will wait and run, from the throughput of the last seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

from rayllm.scheduler.fairness import Backlog
from rayllm.scheduler.scheduler import Scheduler

ASSUMED_STEP_S = {"cpu": 0.05, "cuda": 0.02}
"""The assumed step time before any was measured."""
_MEMORY_S = 10.0
_BACKLOG_WATCH_S = 2.0
_NUM_KNOWN_STEPS = 8


class RecentGrowth:
    """What some totals grew by over about the last `_MEMORY_S` seconds, and the seconds measured."""

    def __init__(self, now: float, totals: Sequence[int]):
        self.seconds = 0.0
        self.growth = [0.0] * len(totals)
        self._looked_at, self._totals = now, totals

    def look(self, now: float, totals: Sequence[int], *, counts: bool = True) -> None:
        """Adds what came since the last look, where that `counts`."""
        if counts:
            elapsed_s = now - self._looked_at
            weight = max(0.0, 1.0 - elapsed_s / _MEMORY_S)
            self.seconds = self.seconds * weight + elapsed_s
            news = zip(self.growth, totals, self._totals, strict=True)
            self.growth = [value * weight + total - before for value, total, before in news]
        self._looked_at, self._totals = now, totals


class ThroughputEstimate:
    """How fast waiting sequences start and finish. Only times in which some always wait are measured: they alone show
    what the engine can do. Updated when requests arrive, so it costs a step nothing.

    `typical_step_s` says how long steps have taken at any time, None before the first; then they are taken to last
    `assumed_step_s`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        clock: Callable[[], float],
        typical_step_s: Callable[[], float | None] = lambda: None,
        assumed_step_s: float = ASSUMED_STEP_S["cpu"],
        num_batched_tokens: int = 2048,
    ):
        self._scheduler = scheduler
        self._clock = clock
        self._typical_step_s = typical_step_s
        self._assumed_step_s = assumed_step_s
        self._num_batched_tokens = num_batched_tokens
        self._num_slack_plans = scheduler.totals.num_slack_plans
        self._all = RecentGrowth(clock(), self._read())
        self._backlogs: WeakKeyDictionary[Backlog, RecentGrowth] = WeakKeyDictionary()

    def _read(self) -> Sequence[int]:
        totals = self._scheduler.totals
        return (
            totals.num_started_tokens,
            self._scheduler.num_plans,
            totals.num_ended_tokens,
            totals.num_ended_max_tokens,
        )

    def look(self, backlog: Backlog | None = None) -> None:
        """Takes what happened since the last look into account, in `backlog` too."""
        scheduler, now = self._scheduler, self._clock()
        always_some = len(scheduler.waiting) > 0 and scheduler.totals.num_slack_plans == self._num_slack_plans
        self._all.look(now, self._read(), counts=always_some)
        self._num_slack_plans = scheduler.totals.num_slack_plans
        if backlog is not None:
            started = (backlog.num_started_tokens,)
            self._backlogs.setdefault(backlog, RecentGrowth(now, started)).look(now, started)

    def wait_s(self, backlog: Backlog | None, num_tokens_ahead: int) -> float | None:
        """Seconds until one that joins `backlog` comes to run; None before anything was measured.

        A backlog that was watched for a while says itself how fast it moves: those who come later may be served before
        it. Else it is the time for `num_tokens_ahead`.
        """
        if backlog is not None:
            growth = self._backlogs[backlog]
            if growth.seconds >= _BACKLOG_WATCH_S and growth.growth[0]:
                return backlog.num_tokens * growth.seconds / growth.growth[0]
        started_tokens = self._all.growth[0]
        return num_tokens_ahead * self._all.seconds / started_tokens if started_tokens else None

    def run_s(self, max_tokens: int) -> float:
        """Seconds that a sequence of `max_tokens` will run: a step for each token, and it comes to as large a part of
        them as others did. 0 before anything was measured."""
        return self._run_s(max_tokens) if self._all.growth[1] and self._all.growth[3] else 0.0

    def _run_s(self, num_tokens: float) -> float:
        """The same, from measurements or else assumptions."""
        _, _, ended_tokens, ended_max_tokens = self._all.growth
        return num_tokens * (ended_tokens / ended_max_tokens if ended_max_tokens else 1.0) * self._step_s

    @property
    def _step_s(self) -> float:
        num_steps = self._all.growth[1]
        if num_steps >= _NUM_KNOWN_STEPS:
            return self._all.seconds / num_steps
        return self._typical_step_s() or self._assumed_step_s

    def work_s(self, num_tokens_ahead: int, num_max_tokens_ahead: int) -> float:
        """Seconds until one comes to run before which so many prompt tokens, and tokens that those may have, wait:
        what runs and what waits, shared by the rows that compute at once."""
        scheduler = self._scheduler
        num_waiting, num_waiting_tokens = len(scheduler.waiting), scheduler.waiting.num_prompt_tokens
        num_fitting = scheduler.num_free_slots * num_waiting // max(1, num_waiting_tokens)
        num_rows = max(1, scheduler.num_running + min(scheduler.num_free_rows, num_waiting, num_fitting))
        num_tokens = (scheduler.num_tokens_left + num_max_tokens_ahead) / num_rows
        return self._run_s(num_tokens) + num_tokens_ahead / self._num_batched_tokens * self._step_s

    def trust(self, max_tokens: int) -> float:
        """From 0 to 1: how far `wait_s` counts against `work_s`. What came to run is a measure once it was watched for
        as long as sequences run: those that began together before say nothing of when the next ones will."""
        return min(1.0, self._all.seconds / max(1e-9, self._run_s(max_tokens)))
