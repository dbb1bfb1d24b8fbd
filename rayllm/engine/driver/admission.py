"""Which requests a driver queues, and which it refuses because it is overloaded."""

from __future__ import annotations

import math
from collections.abc import Callable

from rayllm.config import ResolvedConfig
from rayllm.engine.driver.throughput import ASSUMED_STEP_S, ThroughputEstimate
from rayllm.errors import OverloadedError
from rayllm.request import Request
from rayllm.scheduler.fairness import Backlog
from rayllm.scheduler.scheduler import Scheduler

MAX_RETRY_AFTER_S = 600.0
_MIN_RETRY_AFTER_S = 1.0
_WAIT_SHARE = 0.8
"""Of the time that a deadline leaves: as both wait and run are estimates, a queue filled to the brim with requests that
might just make it would end many of them on their last tokens."""


class Admission:
    """Keeps the queue within its bounds, and out of it what could not be served before its deadline.

    The queue is what waits beyond the rows and the KV blocks that are free. Where it is full, a client that holds
    less than its share of it still gets in, up to twice the bound in all: one client that fills the queue does not
    shut the others out.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        scheduler: Scheduler,
        wall_clock: Callable[[], float],
        clock: Callable[[], float],
        typical_step_s: Callable[[], float | None] = lambda: None,
    ):
        self._config = config.engine
        assumed_step_s = ASSUMED_STEP_S[config.device]
        self._throughput = ThroughputEstimate(
            scheduler, clock, typical_step_s, assumed_step_s, config.max_num_batched_tokens
        )
        self._scheduler = scheduler
        self._wall_clock = wall_clock

    @property
    def token_s(self) -> float:
        """Seconds that each token which a request may have is expected to take once it runs; 0 before anything was
        measured."""
        return self._throughput.run_s(1)

    def check(self, request: Request) -> None:
        """Raises `OverloadedError` for what is too much now. A request that is continued was let in before."""
        backlog = self._scheduler.waiting.backlog(request.client_key, request.priority)
        self._throughput.look(backlog)
        if request.emitted:
            return
        num_sequences, num_tokens = request.params.n, len(request.prompt) // 4 * request.params.n
        scheduler, queue, client = self._scheduler, self._scheduler.waiting, request.client_key
        num_queued = len(queue) + num_sequences - scheduler.num_free_rows
        num_queued_tokens = queue.num_prompt_tokens + num_tokens - scheduler.num_free_slots
        if not len(queue) or (num_queued <= 0 and num_queued_tokens <= 0):
            return
        measured_s, wait_s = self._waits_s(request, backlog, num_tokens)
        own, own_tokens = queue.num_waiting_of(client)
        self._check_bound("max_queued_requests", num_queued, own + num_sequences, client, wait_s)
        self._check_bound("max_queued_tokens", num_queued_tokens, own_tokens + num_tokens, client, wait_s)
        self._check_deadline(request, None if measured_s is None else wait_s)

    def _waits_s(self, request: Request, backlog: Backlog | None, num_tokens: int) -> tuple[float | None, float]:
        """Seconds until the request would come to run: as measured, None before there was anything to measure; and the
        best estimate, which there always is."""
        queue, throughput = self._scheduler.waiting, self._throughput
        of_whom = request.client_key, request.priority
        num_max_tokens = request.max_tokens * request.params.n
        num_tokens_ahead = queue.num_tokens_ahead(*of_whom, num_tokens)
        measured_s = throughput.wait_s(backlog, num_tokens_ahead)
        work_s = throughput.work_s(num_tokens_ahead, queue.num_max_tokens_ahead(*of_whom, num_max_tokens))
        if measured_s is None:
            return None, work_s
        trust = throughput.trust(request.max_tokens)
        return measured_s, trust * measured_s + (1 - trust) * work_s

    def _check_bound(self, name: str, num_queued: int, num_own: int, client: str, wait_s: float) -> None:
        limit: int | None = getattr(self._config, name)
        if limit is None or num_queued <= limit:
            return
        if num_own * self._scheduler.waiting.num_clients_with(client) <= limit and num_queued <= 2 * limit:
            return
        retry_after_s = min(max(wait_s, _MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
        raise OverloadedError(
            f"the engine's queue is full: with this request {num_queued} would wait, {name}={limit}; retry in "
            f"about {math.ceil(retry_after_s)} s",
            retry_after_s,
            name,
        )

    def _check_deadline(self, request: Request, wait_s: float | None) -> None:
        if request.deadline_s is None or wait_s is None:
            return
        left_s = request.deadline_s - self._wall_clock()
        run_s = self._throughput.run_s(request.max_tokens)
        if wait_s >= _WAIT_SHARE * left_s or wait_s + run_s >= left_s:
            raise OverloadedError(
                f"the request cannot be finished in the {max(0.0, left_s):.1f} s that its deadline leaves: about "
                f"{wait_s:.1f} s of other work are queued before it, and it would run for {run_s:.1f} s; retry "
                "later or allow more time",
                min(wait_s, MAX_RETRY_AFTER_S),
                "deadline",
            )
