"""What the step loop counts, and the stats made from it."""

from __future__ import annotations

from collections.abc import Callable

from rayllm.engine.driver.supervisor import Supervisor
from rayllm.messages import EngineStats, StepPlan, StepResult
from rayllm.observability.declared import ITERATION_EDGES, STEP_EDGES_S
from rayllm.observability.histogram import Histogram
from rayllm.observability.statistics import StatisticsSample
from rayllm.scheduler.scheduler import Scheduler


class EngineCounters:
    """The loop counts events; others read stats. Totals only grow."""

    def __init__(
        self,
        scheduler: Scheduler,
        supervisor: Supervisor,
        clock: Callable[[], float],
        num_driver_restarts: int = 0,
    ):
        self._scheduler = scheduler
        self._supervisor = supervisor
        self._clock = clock
        self.progress_at = clock()
        """When the last step was finished, or there was work again."""
        self._num_driver_restarts = num_driver_restarts
        self._step_after_idleness = 0
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._num_steps = 0
        self._step_wait_s = 0.0
        self._num_replays = 0
        self._num_recomputed_tokens = 0
        self._refusals: dict[str, int] = {}
        self._step_tokens = Histogram(ITERATION_EDGES)
        self._step_gaps = Histogram(STEP_EDGES_S)

    # ------------------------------------------------------------------------------------------------ what happens

    def note_arrival(self, num_prompt_tokens: int, now: float) -> None:
        """A request is about to be queued."""
        self._num_prompt_tokens += num_prompt_tokens
        if not self._scheduler.has_work:
            self.progress_at = now
            self._step_after_idleness = self._scheduler.num_plans + 1

    def note_refusal(self, limit: str) -> None:
        self._refusals[limit] = self._refusals.get(limit, 0) + 1

    def note_plan(self, plan: StepPlan) -> None:
        self._step_tokens.observe(plan.num_tokens)

    def note_result(self, result: StepResult) -> None:
        self._num_steps += 1
        if result.step != self._step_after_idleness:  # before that one there was nothing to plan
            self._step_wait_s += result.waited_s
            self._step_gaps.observe(result.waited_s)
        self.progress_at = self._clock()

    def note_tokens(self, num_tokens: int) -> None:
        """So many were sent on."""
        self._num_generation_tokens += num_tokens

    def note_rewind(self) -> None:
        """All that runs is about to lose its KV."""
        self._num_replays += self._scheduler.num_running
        self._num_recomputed_tokens += self._scheduler.num_computed_tokens
        self.progress_at = self._clock()

    # ---------------------------------------------------------------------------------------------- how things stand

    def sample(self) -> StatisticsSample:
        """For the statistics line. May be called from another thread."""
        scheduler, totals = self._scheduler, self._scheduler.totals
        return StatisticsSample(
            num_prompt_tokens=totals.num_started_tokens,
            num_generation_tokens=self._num_generation_tokens,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=scheduler.num_blocks,
            num_blocks_used=scheduler.num_blocks_used,
            prefix_queries=totals.prefix_queries,
            prefix_hits=totals.prefix_hits,
        )

    def stats(self, ticket: int, failure: str) -> EngineStats:
        """`failure`: why the engine is lost; empty else."""
        scheduler, supervisor, totals = self._scheduler, self._supervisor, self._scheduler.totals
        faults = supervisor.fault_counters
        stalled_s = self._clock() - self.progress_at if scheduler.has_work else 0.0
        reason = failure or supervisor.problem
        if not reason and stalled_s > 2 * supervisor.limit_s():
            reason = f"no step finished for {stalled_s:.1f} s while requests were waiting"
        return EngineStats(
            ticket=ticket,
            healthy=not reason,
            reason=reason,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=scheduler.num_blocks,
            num_blocks_used=scheduler.num_blocks_used,
            num_slots_filled=scheduler.num_slots_filled,
            num_preemptions=totals.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generation_tokens=self._num_generation_tokens,
            prefix_queries=totals.prefix_queries,
            prefix_hits=totals.prefix_hits,
            num_steps=self._num_steps,
            step_wait_s=self._step_wait_s,
            stalled_s=stalled_s,
            recovering=supervisor.recovering,
            num_faults=faults.num_faults,
            detection_s=faults.detection_s,
            gap_s=faults.gap_s,
            num_replays=self._num_replays,
            num_recomputed_tokens=self._num_recomputed_tokens,
            recovery_s=faults.recovery_s,
            faults=dict(faults.by_kind),
            refusals=dict(self._refusals),
            num_driver_restarts=self._num_driver_restarts,
            step_tokens=self._step_tokens.snapshot(),
            step_gaps=self._step_gaps.snapshot(),
            fault_detections=faults.detections.snapshot(),
            fault_gaps=faults.gaps.snapshot(),
        )
