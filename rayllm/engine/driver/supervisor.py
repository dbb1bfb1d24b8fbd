"""What happens when a step does not return: which rank failed, when to keep waiting, when to give up. No Ray in here.

The executor reports a crash. Nothing reports a hang: when a step takes far longer than steps of its size do, the ranks
are asked whether they are alive. Recovery runs in a thread beside the loop, which keeps answering clients.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from rayllm.engine.driver.step_times import COMPILING_STEPS_S, SentStep, StepTimes
from rayllm.errors import EngineError, WorkerDiedError
from rayllm.executor.executor import Executor
from rayllm.executor.stopwatch import Stopwatch, in_words
from rayllm.messages import StepPlan, StepResult
from rayllm.observability.declared import LATENCY_EDGES_S
from rayllm.observability.histogram import Histogram

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""How often to look whether a rank that is waited for is stopped."""
EXTENDED_LIMIT_S = 30.0
"""Where all ranks answer, a slow step (a kernel that is compiled, an overloaded machine) is likelier than a deadlock,
which the collectives' own time limit ends.
"""
MAX_IDLE_FAULTS = 3
MAX_BUSY_FAULTS = 8
"""Faults in a row without a finished step between: with nothing running, or with something. A request that kills its
worker ends at three; so many more mean that the machine is at fault."""
_FORGET_AFTER_S = 600.0


@dataclass(slots=True)
class FaultCounters:
    """For `EngineStats`; see there."""

    num_faults: int = 0
    detection_s: float = 0.0
    gap_s: float = 0.0
    recovery_s: dict[str, float] = field(default_factory=dict)
    by_kind: dict[str, int] = field(default_factory=lambda: {"crash": 0, "hang": 0})
    detections: Histogram = field(default_factory=lambda: Histogram(LATENCY_EDGES_S))
    gaps: Histogram = field(default_factory=lambda: Histogram(LATENCY_EDGES_S))

    def note_fault(self, kind: str, detection_s: float) -> None:
        self.num_faults += 1
        self.by_kind[kind] += 1
        self.detection_s = detection_s
        self.detections.observe(detection_s)

    def note_gap(self, gap_s: float) -> None:
        self.gap_s = gap_s
        self.gaps.observe(gap_s)


class Outcome(Enum):
    RECOVERED = "recovered"
    """All ranks are ready for a new epoch and know no row."""
    ALL_ALIVE = "all alive"
    """All ranks answer: the step may still finish and gets more time, once."""


class Supervisor:
    """Stands between the loop and its executor. Called on the loop's thread; recovering has a thread of its own.

    `wake` is called from that thread when there is an outcome. Without `wake`, recovering is done by the caller.
    """

    def __init__(
        self,
        executor: Executor,
        wake: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        compiles: bool = False,
    ):
        """`compiles`: whether workers compile kernels and capture graphs as steps need them."""
        self.fault_counters = FaultCounters()
        self.epoch = 0
        self.problem = ""
        """What is being investigated or recovered from; empty while all is well."""
        self._executor = executor
        self._wake = wake
        self._clock = clock
        self._times = StepTimes(compiles=compiles)
        self._sent: deque[SentStep] = deque()
        self._recovery: threading.Thread | None = None
        self._outcome: Outcome | EngineError | None = None
        self._limit_extended = False
        self._num_consecutive_faults = 0
        self._fault_at = -_FORGET_AFTER_S
        self._sign_of_life_at = self._committed_at = clock()
        self._gap_began_at: float | None = None
        self._stopwatch: Stopwatch | None = None
        self._looked_at = 0.0
        self._looks_stopped = False

    # ------------------------------------------------------------------------------------------------ steps

    def send(self, plan: StepPlan) -> None:
        self._sent.append(self._times.sent(plan))
        self._sign_of_life_at = self._clock()
        self._executor.send(plan)

    def receive(self, timeout_s: float | None = None) -> StepResult:
        """The oldest plan's result. Raises `WorkerDiedError`, and `TimeoutError` where it takes longer than
        `timeout_s`, or than it may.
        """
        result = self._await_result(timeout_s)
        while result.epoch != self.epoch:  # of a worker that was given up
            result = self._await_result(timeout_s)
        now = self._sign_of_life_at = self._committed_at = self._clock()
        self._times.note(self._sent.popleft(), result.elapsed_s)
        self._limit_extended = False
        self._num_consecutive_faults = 0
        if self._gap_began_at is not None:
            self.fault_counters.note_gap(now - self._gap_began_at)
            self._gap_began_at = None
        if self._stopwatch is not None:
            self._stopwatch.lap("first step")
            self.fault_counters.recovery_s, self._stopwatch = self._stopwatch.laps, None
            log.warning(
                "recovered: the first step after the fault finished; seconds per stage: %s",
                in_words(self.fault_counters.recovery_s),
            )
        return result

    def _await_result(self, timeout_s: float | None) -> StepResult:
        if timeout_s is not None:
            return self._executor.receive(timeout_s)
        left_s, stopped = self.limit_s(), False
        while True:
            try:
                return self._executor.receive(min(left_s, LOOK_S))
            except TimeoutError:
                left_s -= LOOK_S
                was_stopped, stopped = stopped, bool(self._executor.stopped_ranks())
                if left_s <= 0 or (stopped and was_stopped):
                    raise

    @property
    def typical_step_s(self) -> float | None:
        """How long steps take; None before the first."""
        return self._times.typical_s

    def sees_stopped_rank(self) -> bool:
        """Whether a rank whose result is waited for was stopped at this look and at the one before. It looks no more
        often than each `LOOK_S`."""
        now = self._clock()
        if now - max(self._looked_at, self._sign_of_life_at) < LOOK_S:
            return False
        was_stopped = self._looks_stopped and self._looked_at > self._sign_of_life_at
        self._looked_at, self._looks_stopped = now, bool(self._executor.stopped_ranks())
        return self._looks_stopped and was_stopped

    def limit_s(self) -> float:
        """How long the oldest plan that is out may take."""
        limit_s = self._times.limit_s(self._sent[0] if self._sent else SentStep(1))
        if not self._limit_extended:
            return limit_s
        return max(limit_s, EXTENDED_LIMIT_S if self._times.are_known else COMPILING_STEPS_S)

    # ----------------------------------------------------------------------------------------------- faults

    @property
    def recovering(self) -> bool:
        """Whether `outcome` is to be asked before the next step."""
        return self._recovery is not None or self._outcome is not None

    def investigate(self) -> None:
        """The step did not finish in time."""
        self.problem = f"a step did not finish within {self.limit_s():.1f} s; checking whether its ranks are alive"
        self._begin(None)

    def recover(self, fault: WorkerDiedError) -> None:
        """A worker is lost."""
        self.problem = f"{fault}; it is being replaced"
        self._begin(fault)

    def outcome(self) -> Outcome | None:
        """The outcome of an investigation, once; None while it runs. Raises `EngineError` if recovery failed."""
        outcome = self._outcome
        if outcome is None:
            return None
        self._recovery = self._outcome = None
        self.problem = ""
        if isinstance(outcome, EngineError):
            raise outcome
        if outcome is Outcome.RECOVERED:
            self.epoch += 1
            self._sent.clear()
            self._times.forget_kinds()
            self._limit_extended = False
            self._sign_of_life_at = self._clock()
        return outcome

    def _begin(self, fault: WorkerDiedError | None) -> None:
        if self._wake is None:
            self._outcome = self._settle(fault)
            return
        self._recovery = threading.Thread(target=self._run, args=(fault, self._wake), name="recovering", daemon=True)
        self._recovery.start()

    def _run(self, fault: WorkerDiedError | None, wake: Callable[[], None]) -> None:
        self._outcome = self._settle(fault)
        wake()

    def _settle(self, fault: WorkerDiedError | None) -> Outcome | EngineError:
        try:
            lost = [fault.rank] if fault is not None else self._executor.silent_ranks()
            if not lost and not self._limit_extended:
                self._limit_extended = True
                return Outcome.ALL_ALIVE
            self._note("hang" if fault is None else "crash", fault := fault or _hang(lost))
            stopwatch = self._stopwatch = Stopwatch(self._clock)
            laps = self._executor.recover(lost or self._executor.ranks)
            stopwatch.lap("recovery")
            stopwatch.laps = laps or stopwatch.laps
        except EngineError as error:
            return error
        except Exception as error:
            log.exception("a worker could not be replaced")
            return EngineError(f"a worker could not be replaced: {type(error).__name__}: {error}", code="worker_died")
        return Outcome.RECOVERED

    def _note(self, kind: str, fault: WorkerDiedError) -> None:
        """Counts the fault. Raises the last error of a rank that keeps failing."""
        now = self._clock()
        self.fault_counters.note_fault(kind, now - self._sign_of_life_at)
        if self._sent and self._gap_began_at is None:
            self._gap_began_at = self._committed_at
        if now - self._fault_at > _FORGET_AFTER_S:
            self._num_consecutive_faults = 0
        self._fault_at = now
        self._num_consecutive_faults += 1
        self.problem = f"{fault}; it is being replaced"
        log.warning("%s; replacing it", fault)
        if self._num_consecutive_faults > (MAX_BUSY_FAULTS if self._sent else MAX_IDLE_FAULTS):
            raise WorkerDiedError(
                fault.rank,
                f"{fault.reason}; {self._num_consecutive_faults} faults in a row without a finished step; "
                f"{self._executor.describe_rank(fault.rank)}",
            )


def _hang(silent: list[int]) -> WorkerDiedError:
    if silent:
        return WorkerDiedError(silent[0], "its process hangs: it does not answer")
    return WorkerDiedError(0, "its step did not finish although all ranks are alive; all ranks are being replaced")
