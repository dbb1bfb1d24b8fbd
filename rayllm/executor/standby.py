"""The standby: a spare worker process that takes a lost rank's place."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from concurrent.futures import Future
from typing import Any

import ray

from rayllm.executor.rank_actors import ANSWER_TIMEOUT_S, RankActors
from rayllm.executor.worker_process import WorkerPlace

DELAY_S = 1.0
"""After a recovery, until the next standby starts: its start would take cores from requests that catch up."""


@dataclasses.dataclass(frozen=True)
class _Spare:
    """A worker without a rank, and what it was asked."""

    actor: Any
    place_ref: Any
    prepared: Future[None]

    def place(self, timeout_s: float) -> WorkerPlace | None:
        """Where it lives; None where it does not yet, or no longer."""
        try:
            place: WorkerPlace = ray.get(self.place_ref, timeout=timeout_s)
        except ray.exceptions.RayError:
            return None
        return place


class Standby:
    """One spare worker at most; none where not `enabled`. It is made and ended under the lock of the actors whose rank
    it may take."""

    def __init__(self, actors: RankActors, enabled: bool):
        self._actors = actors
        self._enabled = enabled
        self._spare: _Spare | None = None
        self._timer: threading.Timer | None = None

    @property
    def is_ready(self) -> bool:
        spare = self._spare
        return spare is not None and spare.prepared.done() and spare.prepared.exception() is None

    def place(self, timeout_s: float) -> WorkerPlace | None:
        """Where the spare worker lives; None without one, or while Ray starts it."""
        spare = self._spare
        return None if spare is None else spare.place(timeout_s)

    def prepare(self) -> None:
        """Starts a spare worker, and has it get ready beside the others' work."""
        with self._actors.lock:
            if self._spare is not None or self._actors.closed or not self._enabled:
                return
            actor = self._actors.create(None)
            self._spare = _Spare(actor, actor.place.remote(), actor.prepare.remote().future())

    def prepare_later(self) -> None:
        """The same after `DELAY_S`."""
        with self._actors.lock:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(DELAY_S, self.prepare)
            self._timer.daemon = True
            self._timer.start()

    def promote(self, rank: int) -> bool:
        """Gives the rank to the spare worker, where there is one and it lives on the lost one's node."""
        with self._actors.lock:
            spare, old = self._spare, self._actors.places.get(rank)
            if spare is None or old is None:
                return False
            place = spare.place(ANSWER_TIMEOUT_S)
            if place is None or place.node_id != old.node_id:
                return False
            self._spare = None
            self._actors.adopt(rank, spare.actor, dataclasses.replace(place, devices=old.devices))
        self._actors.begin([rank], "take", rank)  # where it has died, the next call fails
        return True

    def close(self) -> list[WorkerPlace]:
        """Ends the spare worker; where it lived."""
        with self._actors.lock:
            spare, self._spare = self._spare, None
            if self._timer is not None:
                self._timer.cancel()
        if spare is None:
            return []
        place = spare.place(0)
        with contextlib.suppress(Exception):
            ray.kill(spare.actor, no_restart=True)
        return [place] if place is not None else []
