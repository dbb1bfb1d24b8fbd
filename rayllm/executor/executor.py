"""What the step loop asks of whatever computes its plans."""

from __future__ import annotations

import select
from collections.abc import Sequence
from typing import Protocol

from rayllm.messages import StepPlan, StepResult


class Selectable(Protocol):
    """Anything that `select` can wait for."""

    def fileno(self) -> int: ...


def wait_readable(*sources: Selectable) -> list[Selectable]:
    """Waits until some of the sources are readable, or at their end; returns those."""
    waiting = select.poll()
    for source in sources:
        waiting.register(source.fileno(), select.POLLIN)
    ready = {descriptor for descriptor, _ in waiting.poll()}
    return [source for source in sources if source.fileno() in ready]


class Executor(Protocol):
    """One or more workers, seen as one. Used from a single thread; results come in the order of the plans."""

    @property
    def max_inflight_steps(self) -> int:
        """Steps that may be in flight at once: 2 with worker processes and on a GPU, else 1."""

    @property
    def num_blocks(self) -> int:
        """KV blocks, the least over the workers."""

    def send(self, plan: StepPlan) -> None:
        """Gives the plan to all workers and returns at once. A lost worker is reported by `receive`."""

    def receive(self, timeout_s: float | None) -> StepResult:
        """The result of the oldest plan sent.

        Raises `WorkerDiedError` when a worker is lost or reports that it failed, and `TimeoutError`.
        """

    def check(self) -> None:
        """Raises `WorkerDiedError` when a worker is lost, without waiting; for a loop that has no plan to
        wait for.
        """

    def result_socket(self) -> Selectable | None:
        """Readable when a result or a loss may be there; None where `receive` itself computes."""

    @property
    def ranks(self) -> Sequence[int]:
        """All of them."""

    def silent_ranks(self) -> list[int]:
        """Ranks whose process does not answer within a second: stopped, frozen or unreachable. One that waits for its
        peers in a step does answer.
        """

    def stopped_ranks(self) -> list[int]:
        """Ranks whose process is seen, at a glance, to be stopped by a signal."""

    def recover(self, lost: Sequence[int]) -> dict[str, float]:
        """Ends the ranks in `lost` and any other that is dead, puts new ones in their place, and has all of them start
        anew with no rows and no plans. The others keep their weights. May be called from another thread than the
        rest, while nothing else is. Returns where the time went: seconds by stage.

        Raises `EngineError` where replacements fail too.
        """

    def describe_rank(self, rank: int) -> str:
        """Where the rank lives or lived, and the last error in its log, fit to be shown to clients; the whole end of
        that log goes to this process's own."""

    def close(self) -> None:
        """Ends the workers and leaves nothing behind; idempotent."""
