"""One worker in this process, without Ray. On a CPU a plan is computed when its result is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from rayllm.config import ResolvedConfig
from rayllm.errors import WorkerDiedError
from rayllm.executor.executor import Selectable
from rayllm.executor.pipeline import StepPipeline, StepRunner
from rayllm.messages import StepPlan, StepResult
from rayllm.weights.progress import LoadProgress


class InprocExecutor:
    """Runs plans on the caller's thread; a failing runner is a dead worker of rank 0."""

    def __init__(self, runner: StepRunner):
        self.num_blocks = runner.num_blocks_available()
        runner.start(self.num_blocks)
        runner.warm_up()
        self.max_inflight_steps = runner.max_launched_steps
        self._runner = runner
        self._pipeline = StepPipeline(runner)
        self._failure: WorkerDiedError | None = None

    @classmethod
    def load(cls, config: ResolvedConfig, progress: LoadProgress | None = None) -> InprocExecutor:
        """Loads the model on this process's device. The thread that calls this should also be the one that computes:
        see `engine_thread`."""
        from rayllm.distributed.groups import TensorParallel
        from rayllm.runner.runner import Runner

        return cls(Runner(config, TensorParallel(), progress=progress))

    def send(self, plan: StepPlan) -> None:
        self._pipeline.add(plan)

    def receive(self, timeout_s: float | None) -> StepResult:
        """Computes the oldest plan, or waits for the device that does; `timeout_s` bounds only the wait for a plan that
        was never sent."""
        self.check()
        if not self._pipeline:
            raise TimeoutError("no plan was sent")
        try:
            result = self._pipeline.finish().result
        except Exception as error:
            self._failure = WorkerDiedError(0, one_line(error))
            raise self._failure from error
        self._pipeline.launch_ahead()
        return result

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def result_socket(self) -> Selectable | None:
        return None

    @property
    def ranks(self) -> Sequence[int]:
        return (0,)

    def silent_ranks(self) -> list[int]:
        return []  # the caller is the worker

    def stopped_ranks(self) -> list[int]:
        return []

    def recover(self, lost: Sequence[int]) -> dict[str, float]:
        """The same runner with its rows forgotten: what failed was a step."""
        self._pipeline.clear()
        self._runner.start(self.num_blocks)
        self._failure = None
        return {}

    def describe_rank(self, rank: int) -> str:
        return "it runs in this process"

    def close(self) -> None:
        self._pipeline.clear()


def one_line(error: BaseException) -> str:
    """An exception as one line: its type and message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
