"""Where a run is hurt: a fake executor and a list of boundaries, all decided by one random generator."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Any

from scheduler.simulated_worker import SimulatedWorker

from rayllm.errors import EngineError, WorkerDiedError
from rayllm.messages import StepPlan, StepResult
from rayllm.request import unpack_ids


class DriverKilled(BaseException):
    """As SIGKILL: no `except Exception` of the driver's sees it."""


class Faults:
    """Says at each boundary whether something breaks there. `budget` bounds how much breaks in a run."""

    def __init__(self, rng: random.Random, worker_rate: float, driver_rate: float, max_worker: int, max_driver: int):
        self.rng = rng
        self.worker_rate = worker_rate
        self.driver_rate = driver_rate
        self.num_worker_left = max_worker
        self.num_driver_left = max_driver
        self.num_recoveries = 0
        self.spoiled: set[tuple[bytes, int]] = set()
        """Prompt and seed of the requests for which a worker computed NaN."""
        self.log: list[str] = []

    def kill_driver_here(self, boundary: str, times: int = 1) -> None:
        """Raises `DriverKilled` in its turn; `times` as often at a boundary that is seldom come to."""
        if self.num_driver_left and self.rng.random() < self.driver_rate * times:
            self.num_driver_left -= 1
            self.log.append(f"driver killed {boundary}")
            raise DriverKilled(boundary)

    def worker_breaks(self, boundary: str) -> bool:
        broken = self.num_worker_left > 0 and self.rng.random() < self.worker_rate
        if broken:
            self.num_worker_left -= 1
            self.log.append(f"worker broken {boundary}")
        return broken


class FaultyExecutor:
    """Two ranks that do the same, of which one is simulated, and which die, hang, dawdle and answer late."""

    ranks: Sequence[int] = (0, 1)

    def __init__(self, faults: Faults, max_inflight_steps: int, **worker_settings: Any):
        self.max_inflight_steps = max_inflight_steps
        self.num_blocks = worker_settings["num_blocks"]
        self.epoch = 0
        self._faults = faults
        self._worker_settings = worker_settings
        self._worker = SimulatedWorker(**worker_settings)
        self._results: deque[StepResult | None] = deque()  # None: the plan did not reach all ranks
        self._late: list[StepResult] = []
        self._lost: WorkerDiedError | None = None
        self._hung: list[int] | None = None

    def send(self, plan: StepPlan) -> None:
        self._faults.kill_driver_here("before a plan is sent")
        assert len(self._results) < self.max_inflight_steps, "more steps in flight than max_inflight_steps"
        assert plan.epoch == self.epoch
        if self._faults.worker_breaks("before a plan"):
            self._lose("it died before a plan")
        reached = self._lost is None
        self._results.append(self._run(plan) if reached else None)
        if reached and self._faults.worker_breaks("during a plan"):
            self._lose("it died during a plan")
            self._results[-1] = None
        self._faults.kill_driver_here("after a plan is sent")

    def _run(self, plan: StepPlan) -> StepResult:
        result = self._worker.run(plan)
        if result.rows and self._faults.worker_breaks("by NaN in one row"):
            row = self._faults.rng.choice(unpack_ids(result.rows))
            start = self._worker.rows[row].start
            self._faults.spoiled.add((start.tokens[: 4 * start.num_prompt_tokens], start.seed))
            return self._worker.spoil(result, row)
        return result

    def receive(self, timeout_s: float | None) -> StepResult:
        self._faults.kill_driver_here("before a result")
        rng = self._faults.rng
        if self._late:
            return self._late.pop(0)
        if self._lost is None and self._hung is None:
            if self._faults.worker_breaks("before a result"):
                self._lose("it died with a result")
            elif self._faults.worker_breaks("by a hang"):
                self._hung = rng.choice([[0], [1], [0, 1], []])
        if self._hung is not None:
            raise TimeoutError("no result in time")
        if self._lost is not None and (not self._results or self._results[0] is None or rng.random() < 0.5):
            raise self._lost  # else the result was in the socket already
        result = self._results.popleft()
        assert result is not None
        if self._faults.worker_breaks("after a result"):
            self._lose("it died after a result")
        self._faults.kill_driver_here("after a result")
        return result

    def check(self) -> None:
        if self._lost is None and self._faults.worker_breaks("while idle"):
            self._lose("it died while idle")
        if self._lost is not None:
            raise self._lost

    def silent_ranks(self) -> list[int]:
        assert self._hung is not None
        silent = self._hung
        if not silent and self._faults.rng.random() < 0.5:
            self._hung = None  # it was only slow
        return silent

    def stopped_ranks(self) -> list[int]:
        return []

    def recover(self, lost: Sequence[int]) -> dict[str, float]:
        self._faults.kill_driver_here("during recovery", times=8)
        assert lost
        self._faults.num_recoveries += 1
        if self._faults.worker_breaks("for good, in its replacement"):
            raise EngineError("a worker could not be replaced: its replacement failed", code="worker_died")
        if self._hung:  # a stopped worker that continues answers what no one asks any more
            self._late += [result for result in self._results if result is not None]
        self.epoch += 1
        self._results.clear()
        self._lost = self._hung = None
        self._worker = SimulatedWorker(**self._worker_settings)
        return {}

    def describe_rank(self, rank: int) -> str:
        return f"rank {rank} is simulated"

    def result_socket(self) -> None:
        return None

    def close(self) -> None:
        pass

    def _lose(self, reason: str) -> None:
        self._lost = WorkerDiedError(self._faults.rng.choice(self.ranks), reason)
