"""The step loop: requests in, plans out, results back, deltas to whoever asked. Plain Python on one thread.

With an executor of depth 2, step n+1 is planned and sent while n runs, so that workers never wait for a plan.
The loop knows clients by an opaque value, their streams by number, and nothing of sockets, actors or text.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import msgspec

from rayllm.config import ResolvedConfig
from rayllm.engine.admission import Admission, check_request
from rayllm.engine.mirror import Kept, Mirror
from rayllm.engine.supervisor import COMPILING_STEPS_S, FIRST_STEPS_S, LOOK_S, Outcome, Supervisor
from rayllm.engine.totals import Totals
from rayllm.errors import EngineError, OverloadedError, RequestError, WorkerDiedError
from rayllm.executor.executor import Executor
from rayllm.messages import (
    ADOPTED_BY_ANOTHER,
    READER_PAUSED,
    Abort,
    Adopt,
    Adopted,
    ClientMessage,
    Deltas,
    DriverMessage,
    EngineStats,
    Finish,
    Forget,
    IngressReport,
    StatsQuery,
    StepPlan,
    StepResult,
    Submit,
    Times,
    TokenDelta,
)
from rayllm.observability.statistics import Figures
from rayllm.observability.trace import DriverSpans, Tracer
from rayllm.request import Request, pack_ids, unpack_ids
from rayllm.scheduler.scheduler import Scheduler, SequenceUpdate
from rayllm.scheduler.sequence import Sequence

log = logging.getLogger(__name__)

MAX_FAULTS_OF_REQUEST = 3
"""A request in the plans at so many faults is refused: it may be what kills the workers."""

Client = Hashable
Outbox = Callable[[Client, DriverMessage], None]


@dataclass(slots=True)
class _Open:
    """A request that is being served, and where its choices' tokens go."""

    client: Client
    first_stream: int
    sequences: dict[int, Sequence]
    deadline_s: float | None
    arrived_at: float
    log_id: str
    spans: DriverSpans | None
    started_at: dict[int, float] = field(default_factory=dict)
    """Of each choice that is in plans and has no token yet."""
    unfinished: set[int] = field(default_factory=set)
    num_faults: int = 0
    """Faults at which it was in a plan that was out."""
    kept: Kept | None = None
    """Where it outlives its client."""

    @property
    def is_queued(self) -> bool:
        """Whether nothing of it was ever computed."""
        return all(sequence.row is None and not sequence.num_emitted for sequence in self.sequences.values())

    @property
    def max_tokens(self) -> int:
        return next(iter(self.sequences.values())).request.max_tokens


class EngineLoop:
    """Drives one scheduler over one executor. Call `submit` and `step` from the same thread.

    `outbox(client, message)` delivers; it must not block. `wall_clock` is Unix time, for deadlines; `clock` is
    monotonic. `wake` is called from another thread when `step` has something to do again after a fault; without it
    workers are replaced inside `step`.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        scheduler: Scheduler,
        executor: Executor,
        outbox: Outbox,
        wall_clock: Callable[[], float] = time.time,
        wake: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._config = config
        self._scheduler = scheduler
        self._executor = executor
        self._outbox = outbox
        self._wall_clock = wall_clock
        self._admission = Admission(config, scheduler, wall_clock, clock)
        self._clock = clock
        first_steps_s = FIRST_STEPS_S if config.device == "cpu" else COMPILING_STEPS_S
        self._supervisor = Supervisor(executor, wake, clock, first_steps_s)
        self._progress_at = clock()
        self._open: dict[str, _Open] = {}
        self._streams: dict[tuple[Client, int], tuple[str, int]] = {}
        self._pending: dict[Client, list[TokenDelta]] = {}
        self._totals = Totals()
        self._failure: EngineError | None = None
        self._num_deadlines = 0
        self._reports: dict[Client, IngressReport] = {}
        self._mirror = Mirror()
        self._step_after_idleness = 0
        self.meanwhile: Callable[[float], None] | None = None
        """Waits at most so long for a sign of the workers, and has messages taken that come meanwhile."""
        self.num_driver_restarts = 0
        """For `EngineStats`."""
        self.tracer: Tracer | None = None
        """Where spans of requests that carry a `traceparent` go."""

    # ------------------------------------------------------------------------------------------------ requests in

    def submit(self, client: Client, message: ClientMessage) -> None:
        """Takes one message of a client: a request, an abort, an adoption, figures or a question for them."""
        if isinstance(message, Submit):
            self._submit(client, message)
        elif isinstance(message, Abort):
            self._abort_stream(client, message.stream, pauses=message.pauses)
        elif isinstance(message, Adopt):
            self._adopt(client, message)
        elif isinstance(message, Forget):
            self._mirror.forget(message.client_key, message.answer_id)
        elif isinstance(message, StatsQuery):
            others = [report for other, report in self._reports.items() if other != client]
            self._outbox(client, msgspec.structs.replace(self.stats(message.ticket), reports=others))
        elif isinstance(message, IngressReport):
            self._reports[client] = message

    def _submit(self, client: Client, message: Submit) -> None:
        request = message.request
        streams = range(message.stream, message.stream + request.params.n)
        try:
            if self._failure is not None:
                raise self._failure
            check_request(request, self._config)
            self._admission.check(request)
        except OverloadedError as error:
            self._totals.refusals[error.limit] = self._totals.refusals.get(error.limit, 0) + 1
            finish = Finish("error", code="overloaded", message=str(error), retry_after_s=error.retry_after_s)
            self._refuse(client, request, streams, finish)
            return
        except (RequestError, EngineError) as error:
            self._refuse(client, request, streams, Finish("error", code=error.code, message=str(error)))
            return
        # Clients choose their ids freely; the scheduler's must be unique among all of them.
        open_id = f"{client}/{message.stream}"
        kept = self._mirror.add(request, open_id) if request.keep is not None else None
        request = msgspec.structs.replace(request, request_id=open_id, keep=None)
        now = self._clock()
        if not self._scheduler.has_work:
            self._progress_at = now
            self._step_after_idleness = self._scheduler.num_plans + 1
        spans = DriverSpans(self.tracer, request.traceparent, now) if self.tracer and request.traceparent else None
        sequences = {sequence.choice: sequence for sequence in self._scheduler.add(request)}
        self._open[open_id] = _Open(
            client,
            message.stream,
            sequences,
            request.deadline_s,
            now,
            request.log_id,
            spans,
            unfinished=set(sequences),
            kept=kept,
        )
        self._num_deadlines += request.deadline_s is not None
        for choice in sequences:
            self._streams[client, message.stream + choice] = open_id, choice
        self._totals.num_prompt_tokens += len(request.prompt) // 4
        for choice, sequence in sequences.items():
            if sequence.finish is not None:  # a continued choice that had come to its end already
                self._queue(self._open[open_id], choice, TokenDelta(message.stream + choice, b"", sequence.finish))
                self._close_choice(open_id, choice)
        self._flush()

    def _refuse(self, client: Client, request: Request, streams: range, finish: Finish) -> None:
        log.info("refused (%s): %s", finish.code, finish.message, extra={"request_id": request.log_id})
        self._outbox(client, Deltas([TokenDelta(stream, b"", finish) for stream in streams]))

    def _abort_stream(self, client: Client, stream: int, *, pauses: bool = False) -> None:
        found = self._streams.get((client, stream))
        if found is None:
            return
        request_id, choice = found
        request = self._open[request_id]
        self._scheduler.abort_sequence(request.sequences[choice])
        if request.kept is not None and not pauses:
            request.kept.history.append(choice, TokenDelta(stream, b"", Finish("abort")))
        self._close_choice(request_id, choice)

    def _adopt(self, client: Client, message: Adopt) -> None:
        """Gives a kept request to this client, from its first token on; who had it is told."""
        kept = self._mirror.find(message.client_key, message.answer_id)
        if kept is not None and not (message.takes_over or kept.is_free):
            kept = None
        self._outbox(client, Adopted(message.stream, None if kept is None else kept.request))
        if kept is None:
            return
        deltas = kept.history.deltas(message.stream)
        request = self._open.get(kept.open_id)
        if request is None or request.kept is not kept:
            kept.alone_since = self._clock()
            paused = Finish("error", code=READER_PAUSED, message="submit the request again")
            choices = kept.history.unfinished(kept.request.params.n)
            deltas += [TokenDelta(message.stream + choice, b"", paused) for choice in choices]
        else:
            kept.alone_since = None
            moved = Finish("error", code=ADOPTED_BY_ANOTHER, message="the answer goes on at another connection")
            choices = sorted(request.unfinished)
            self._outbox(request.client, Deltas([TokenDelta(request.first_stream + c, b"", moved) for c in choices]))
            for choice in choices:
                name = self._streams.pop((request.client, request.first_stream + choice))
                self._streams[client, message.stream + choice] = name
            request.client, request.first_stream = client, message.stream
            log.info("adopted by another client", extra={"request_id": request.log_id})
        if deltas:
            self._outbox(client, Deltas(deltas))

    def client_gone(self, client: Client) -> None:
        """A client left: everything of its is aborted and its KV freed at once, but for what is kept."""
        open_ids = {name for (owner, _), (name, _) in self._streams.items() if owner == client}
        for open_id in open_ids:
            request = self._open[open_id]
            if request.kept is not None and self._mirror.holds(request.kept):
                request.kept.alone_since = self._clock()
                log.info("goes on without its client", extra={"request_id": request.log_id})
                continue
            log.info("aborted: its client is gone", extra={"request_id": request.log_id})
            self._abort_all(request)
        self._pending.pop(client, None)
        self._reports.pop(client, None)

    def _abort_all(self, request: _Open) -> None:
        for choice in sorted(request.unfinished):
            self._abort_stream(request.client, request.first_stream + choice)

    def _close_choice(self, request_id: str, choice: int) -> None:
        request = self._open[request_id]
        request.unfinished.discard(choice)
        self._streams.pop((request.client, request.first_stream + choice), None)
        if not request.unfinished:
            del self._open[request_id]
            if request.kept is not None:
                request.kept.alone_since = self._clock()
            if request.spans is not None:
                request.spans.close(self._clock())
            self._num_deadlines -= request.deadline_s is not None

    # ------------------------------------------------------------------------------------------------ steps

    def step(self) -> bool:
        """One turn: plan and send where the pipeline has room, then take the oldest result when it is full or nothing
        more can be planned. False: there is nothing to do until a message comes, or a lost worker is replaced.

        Raises `EngineError` when the executor is lost for good; by then every open request has been told.
        """
        if self._failure is not None:
            return False
        self._expire()
        try:
            return self._is_mended() and self._turn()
        except EngineError as error:
            self.fail(error)
            raise
        except Exception as error:
            log.exception("the step loop failed")
            failure = EngineError(f"the step loop failed: {type(error).__name__}: {error}")
            self.fail(failure)
            raise failure from error

    @property
    def is_interrupted(self) -> bool:
        """Whether the workers are lost, for good or until they are replaced: nothing comes from them."""
        return self._failure is not None or self._supervisor.mending

    def check(self) -> None:
        """For a loop without work: looks for a lost worker, and has it replaced."""
        if self._failure is None and not self._supervisor.mending:
            try:
                self._executor.check()
            except WorkerDiedError as fault:
                self._supervisor.mend(fault)

    def _turn(self) -> bool:
        scheduler, executor = self._scheduler, self._executor
        plan = scheduler.plan() if scheduler.num_uncommitted < executor.pipeline_depth else None
        if plan is not None:
            self._note_plan(plan)
            self._supervisor.send(plan)
            if scheduler.num_uncommitted < executor.pipeline_depth:
                return True
        if scheduler.num_uncommitted == 0:
            return False
        try:
            result = self._receive()
        except TimeoutError:
            self._supervisor.investigate()
            return True
        except WorkerDiedError as fault:
            self._supervisor.mend(fault)
            return True
        self._note_result(result)
        self._deliver(scheduler.commit(result))
        return True

    def _receive(self) -> StepResult:
        """The oldest plan's result. Raises as `Supervisor.receive` does."""
        if self.meanwhile is None:
            return self._supervisor.receive()
        limit_s = self._supervisor.limit_s()
        deadline = self._clock() + limit_s
        while True:
            with contextlib.suppress(TimeoutError):
                return self._supervisor.receive(0.0)
            left_s = deadline - self._clock()
            if left_s <= 0 or self._supervisor.sees_stopped_rank():
                raise TimeoutError(f"no result of the step within {limit_s:g} s, or a rank is stopped")
            self.meanwhile(min(left_s, LOOK_S))

    def _note_plan(self, plan: StepPlan) -> None:
        self._totals.step_tokens.observe(sum(unpack_ids(plan.counts)))
        started = self._scheduler.take_started()
        now = self._clock() if started else 0.0
        for sequence in started:
            request = self._open.get(sequence.request.request_id)
            if request is not None:
                request.started_at[sequence.choice] = now
                if request.spans is not None:
                    request.spans.started(now)

    def _note_result(self, result: StepResult) -> None:
        totals = self._totals
        totals.num_steps += 1
        totals.worker_s += result.elapsed_s
        if result.step != self._step_after_idleness:  # before that one there was nothing to plan
            totals.step_wait_s += result.waited_s
            totals.step_gaps.observe(result.waited_s)
        self._progress_at = self._clock()

    def _is_mended(self) -> bool:
        """Whether steps may go on; after a fault, from the tokens committed and with nothing else."""
        if not self._supervisor.mending:
            return True
        outcome = self._supervisor.outcome()
        if outcome is Outcome.MENDED:
            self._rewind()
        return outcome is not None

    def _rewind(self) -> None:
        scheduler, totals = self._scheduler, self._totals
        for request_id in scheduler.planned_requests():
            request = self._open[request_id]
            request.num_faults += 1
            if request.spans is not None:
                request.spans.fault()
            log.warning(
                "running when a worker failed, %d times now; it goes on from its tokens",
                request.num_faults,
                extra={"request_id": request.log_id},
            )
        totals.num_replays += scheduler.num_running
        totals.num_recomputed_tokens += scheduler.num_slots_filled
        blamed = {id_: open_.num_faults for id_, open_ in self._open.items() if open_.num_faults > 1}
        scheduler.rewind(self._supervisor.epoch, suspects=blamed)
        self._progress_at = self._clock()
        for request_id, num_faults in blamed.items():
            if num_faults >= MAX_FAULTS_OF_REQUEST:
                message = f"workers failed {num_faults} times while this request ran: it is not tried again"
                self._end(request_id, Finish("error", code="poison_request", message=message))
        self._flush()

    def _deliver(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            sequence = update.sequence
            request_id, choice = sequence.request.request_id, sequence.choice
            request = self._open.get(request_id)
            if request is None or choice not in request.unfinished:
                continue
            self._totals.num_generation_tokens += len(update.token_ids)
            times = self._times(request, choice) if request.started_at else None
            self._queue(request, choice, _delta(request.first_stream + choice, update, times))
            if update.finish is not None:
                self._close_choice(request_id, choice)
                if update.finish.reason == "error" and request.unfinished:
                    self._end(request_id, update.finish)
        self._flush()

    def _times(self, request: _Open, choice: int) -> Times | None:
        """Once for each choice, with its first token."""
        started_at = request.started_at.pop(choice, None)
        if request.spans is not None and started_at is not None:
            request.spans.first_token(self._progress_at)
        return None if started_at is None else Times(started_at - request.arrived_at, self._progress_at - started_at)

    def _queue(self, request: _Open, choice: int, delta: TokenDelta) -> None:
        if request.kept is not None:
            request.kept.history.append(choice, delta)
        self._pending.setdefault(request.client, []).append(delta)

    def _flush(self) -> None:
        """One message a client for all that was queued."""
        pending, self._pending = self._pending, {}
        for client, deltas in pending.items():
            self._outbox(client, Deltas(deltas))

    # ------------------------------------------------------------------------------------------------ ends

    def _expire(self) -> None:
        for kept in self._mirror.expired(self._clock()):
            request = self._open.get(kept.open_id)
            if request is not None and request.kept is kept:
                log.info("aborted: no client came for it", extra={"request_id": request.log_id})
                self._abort_all(request)
        if not self._num_deadlines:
            return
        now = self._wall_clock()
        # While all rows are taken, who waits too long to be finished in time takes none from who can be.
        token_s = 0.0 if self._scheduler.num_free_rows else self._admission.token_s
        for request_id, request in list(self._open.items()):
            if request.deadline_s is None:
                continue
            if request.deadline_s <= now:
                message = "the request's deadline passed before it was finished"
                self._end(request_id, Finish("error", code="deadline_exceeded", message=message))
            elif token_s and request.deadline_s < now + token_s * request.max_tokens and request.is_queued:
                message = "the request waited for so long that it could not be finished before its deadline"
                self._end(request_id, Finish("error", code="deadline_exceeded", message=message))
        self._flush()

    def _end(self, request_id: str, finish: Finish) -> None:
        request = self._open[request_id]
        log.warning("ended (%s): %s", finish.code, finish.message, extra={"request_id": request.log_id})
        for choice in sorted(request.unfinished):
            self._scheduler.abort_sequence(request.sequences[choice])
            self._queue(request, choice, TokenDelta(request.first_stream + choice, b"", finish))
            self._close_choice(request_id, choice)

    def fail(self, error: EngineError) -> None:
        """The executor is lost: every open request ends with the reason, and new ones are refused with it."""
        self._failure = error
        for request_id in list(self._open):
            self._end(request_id, Finish("error", code=error.code, message=str(error)))
        self._flush()

    # ------------------------------------------------------------------------------------------------ figures

    def figures(self) -> Figures:
        """For the statistics line. May be called from another thread."""
        scheduler = self._scheduler
        return Figures(
            num_prompt_tokens=scheduler.num_started_tokens,
            num_generation_tokens=self._totals.num_generation_tokens,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=self._executor.num_blocks,
            num_blocks_used=scheduler.num_blocks_used,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
        )

    def stats(self, ticket: int = 0) -> EngineStats:
        """Counters and gauges as they stand."""
        scheduler, supervisor = self._scheduler, self._supervisor
        stalled_s = self._clock() - self._progress_at if scheduler.has_work else 0.0
        reason = str(self._failure or "")
        if not reason and not supervisor.mending and stalled_s > 2 * supervisor.limit_s():
            reason = f"work waits and no step was finished for {stalled_s:.1f} s"
        return self._totals.stats(
            scheduler,
            supervisor,
            ticket=ticket,
            reason=reason,
            stalled_s=stalled_s,
            num_blocks=self._executor.num_blocks,
            num_driver_restarts=self.num_driver_restarts,
        )


def _delta(stream: int, update: SequenceUpdate, times: Times | None) -> TokenDelta:
    return TokenDelta(
        stream=stream,
        token_ids=pack_ids(update.token_ids),
        finish=update.finish,
        logprobs=update.logprobs,
        prompt_logprobs=update.prompt_logprobs,
        num_cached_tokens=update.num_cached_tokens,
        times=times,
    )
