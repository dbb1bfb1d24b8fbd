"""What one step loop counts, and the figures that are made of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from rayllm.engine.supervisor import Supervisor
from rayllm.messages import EngineStats
from rayllm.observability.declared import ITERATION_EDGES, STEP_EDGES_S
from rayllm.observability.histogram import Histogram
from rayllm.scheduler.scheduler import Scheduler


@dataclass(slots=True)
class Totals:
    """They only grow."""

    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_steps: int = 0
    step_wait_s: float = 0.0
    worker_s: float = 0.0
    num_replays: int = 0
    num_recomputed_tokens: int = 0
    refusals: dict[str, int] = field(default_factory=dict)
    step_tokens: Histogram = field(default_factory=partial(Histogram, ITERATION_EDGES))
    step_gaps: Histogram = field(default_factory=partial(Histogram, STEP_EDGES_S))

    def stats(
        self,
        scheduler: Scheduler,
        supervisor: Supervisor,
        *,
        ticket: int,
        reason: str,
        stalled_s: float,
        num_blocks: int,
        num_driver_restarts: int,
    ) -> EngineStats:
        """Counters and gauges as they stand. `reason`: why the engine is not healthy; empty else."""
        faults = supervisor.figures
        return EngineStats(
            ticket=ticket,
            healthy=not reason,
            reason=reason,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=num_blocks,
            num_blocks_used=scheduler.num_blocks_used,
            num_slots_filled=scheduler.num_slots_filled,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=self.num_prompt_tokens,
            num_generation_tokens=self.num_generation_tokens,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            num_steps=self.num_steps,
            step_wait_s=self.step_wait_s,
            stalled_s=stalled_s,
            recovering=supervisor.mending,
            num_faults=faults.num_faults,
            detection_s=faults.detection_s,
            gap_s=faults.gap_s,
            num_replays=self.num_replays,
            num_recomputed_tokens=self.num_recomputed_tokens,
            recovery_s=faults.recovery_s,
            faults=dict(faults.by_kind),
            refusals=dict(self.refusals),
            num_driver_restarts=num_driver_restarts,
            step_tokens=self.step_tokens.snapshot(),
            step_gaps=self.step_gaps.snapshot(),
            fault_detections=faults.detections.snapshot(),
            fault_gaps=faults.gaps.snapshot(),
        )
