"""Fault injection: a worker is killed because somebody asked for it, to show or to test what happens then.

The process gets SIGKILL, as from the kernel when memory runs out. Nothing else is told of it: the engine finds the
loss and replaces the rank as after any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rayllm.errors import EngineError, EngineUnreachableError
from rayllm.executor.worker_process import WorkerPlace, death_reason


@dataclass(frozen=True)
class KilledWorker:
    """Which process was killed."""

    rank: int
    place: WorkerPlace


class KillsWorkers(Protocol):
    """What is needed of an executor: `WorkerGroup`."""

    def kill(self, rank: int) -> WorkerPlace | None: ...


def kill_rank(executor: KillsWorkers | None, rank: int) -> KilledWorker:
    """Called in the driver. Raises `EngineError` where there is no such process now."""
    place = executor.kill(rank) if executor is not None else None
    if place is None:
        raise EngineError(f"worker rank {rank} is being replaced already: try again", code="worker_not_running")
    return KilledWorker(rank, place)


async def kill_worker(engine: str, rank: int) -> KilledWorker:
    """Asks the driver of the engine of that name to kill one of its workers.

    Raises `EngineError` where that rank is not running, and `EngineUnreachableError` where there is no driver.
    """
    import ray

    from rayllm.engine.discovery import find_driver

    try:
        killed: KilledWorker = await find_driver(engine).kill_worker.remote(rank)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, EngineError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError as error:
        raise EngineUnreachableError(f"the driver of engine {engine!r} is gone: {death_reason(error)}") from None
    return killed
