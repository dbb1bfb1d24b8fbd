"""The step loop: requests in, plans out, results back, deltas to whoever asked. Plain Python on one thread.

Where two steps may be in flight, step n+1 is planned and sent while n runs, so that workers never wait for a plan.
The loop knows clients by an opaque value, their streams by number, and nothing of sockets, actors or text.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

import msgspec

from rayllm.config import ResolvedConfig
from rayllm.engine.driver.admission import Admission
from rayllm.engine.driver.counters import EngineCounters
from rayllm.engine.driver.open_requests import Client, OpenRequest, OpenRequests, Outbox
from rayllm.engine.driver.retained_requests import RetainedRequest, RetainedRequests
from rayllm.engine.driver.supervisor import LOOK_S, Outcome, Supervisor
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
    EngineStats,
    Finish,
    Forget,
    IngressReport,
    ResetPrefixCache,
    StatsQuery,
    StepPlan,
    StepResult,
    Submit,
    Times,
    TokenDelta,
)
from rayllm.observability.trace import DriverSpans, Tracer
from rayllm.request import pack_ids
from rayllm.request.checks import check_request
from rayllm.scheduler.scheduler import Scheduler
from rayllm.scheduler.sequence import SequenceUpdate

log = logging.getLogger(__name__)

MAX_FAULTS_OF_REQUEST = 3
"""A request that was in flight at so many faults is refused: it may be what kills the workers."""
QUARANTINE_TOKENS = 32
"""Tokens that a request computes in quarantine, which begins with its second fault, before it is released: by then it
has recomputed what it was computing at the faults, and other requests in quarantine wait for it."""
MAX_QUARANTINE_RELEASES = 2
"""Per request: it may be what kills the workers only now and then."""
_MAX_SLEEP_S = 3600.0  # `select` does not take any number


class EngineLoop:
    """Drives one scheduler over one executor. Call `submit` and `step` from the same thread.

    `outbox(client, message)` delivers; it must not block. `wall_clock` is Unix time, for deadlines; `clock` is
    monotonic. `wake` is called from another thread when `step` has something to do again after a fault; without it
    workers are replaced inside `step`. `tracer` takes spans of requests that carry a `traceparent`.
    `num_driver_restarts`: drivers of this engine before this one, for `stats`.
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
        tracer: Tracer | None = None,
        num_driver_restarts: int = 0,
    ):
        self._config = config
        self._scheduler = scheduler
        self._executor = executor
        self._outbox = outbox
        self._wall_clock = wall_clock
        self._clock = clock
        self._supervisor = supervisor = Supervisor(executor, wake, clock, compiles=config.device != "cpu")
        self._admission = Admission(config, scheduler, wall_clock, clock, lambda: supervisor.typical_step_s)
        self._open = OpenRequests(outbox)
        self._retained = RetainedRequests(self._drop)
        self._reports: dict[Client, IngressReport] = {}
        self._failure: EngineError | None = None
        self.counters = EngineCounters(scheduler, self._supervisor, clock, num_driver_restarts)
        self._tracer = tracer

    # ------------------------------------------------------------------------------------------------ requests in

    def submit(self, client: Client, message: ClientMessage) -> None:
        """Handles one message of a client: a request, an abort, an adoption, its stats or a query for stats."""
        if isinstance(message, Submit):
            self._submit(client, message)
        elif isinstance(message, Abort):
            self._abort_stream(client, message.stream, pauses=message.pauses)
        elif isinstance(message, Adopt):
            self._adopt(client, message)
        elif isinstance(message, Forget):
            self._retained.forget(message.client_key, message.answer_id)
        elif isinstance(message, (StatsQuery, ResetPrefixCache)):
            if isinstance(message, ResetPrefixCache):
                self._scheduler.reset_prefix_cache()
            others = [report for other, report in self._reports.items() if other != client]
            self._outbox(client, msgspec.structs.replace(self.stats(message.ticket), reports=others))
        elif isinstance(message, IngressReport):
            self._reports[client] = message

    def _submit(self, client: Client, message: Submit) -> None:
        request = message.request
        try:
            if self._failure is not None:
                raise self._failure
            check_request(request, self._config)
            self._admission.check(request)
        except OverloadedError as error:
            self.counters.note_refusal(error.limit)
            finish = Finish("error", code="overloaded", message=str(error), retry_after_s=error.retry_after_s)
            self._refuse(client, message, finish)
        except (RequestError, EngineError) as error:
            self._refuse(client, message, Finish("error", code=error.code, message=str(error)))
        else:
            self._open_request(client, message)

    def _refuse(self, client: Client, message: Submit, finish: Finish) -> None:
        request = message.request
        log.info("request refused (%s): %s", finish.code, finish.message, extra={"request_id": request.log_id})
        choices = range(request.params.n)
        self._outbox(client, Deltas([TokenDelta(message.stream + c, c, b"", finish) for c in choices]))

    def _open_request(self, client: Client, message: Submit) -> None:
        # Clients choose their ids freely; the scheduler's must be unique among all of them.
        open_id = f"{client}/{message.stream}"
        retained = self._retained.add(message.request, open_id) if message.request.retention is not None else None
        request = msgspec.structs.replace(message.request, request_id=open_id, retention=None)
        now = self._clock()
        self.counters.note_arrival(len(request.prompt) // 4, now)
        opened = OpenRequest(
            request_id=open_id,
            client=client,
            first_stream=message.stream,
            sequences={sequence.choice: sequence for sequence in self._scheduler.add(request)},
            deadline_s=request.deadline_s,
            arrived_at=now,
            log_id=request.log_id,
            spans=DriverSpans(self._tracer, request.traceparent, now) if self._tracer and request.traceparent else None,
            retained=retained,
        )
        self._open.add(opened)
        for choice, sequence in opened.sequences.items():
            if sequence.finish is not None:  # a continued choice that had come to its end already
                self._close_choice(opened, choice, sequence.finish)
        self._open.flush()

    def _abort_stream(self, client: Client, stream: int, *, pauses: bool = False) -> None:
        found = self._open.find(client, stream)
        if found is None:
            return
        request, choice = found
        self._scheduler.abort_sequence(request.sequences[choice])
        if request.retained is not None and not pauses:
            request.retained.history.append(choice, TokenDelta(stream, choice, b"", Finish("abort")))
        self._open.close_choice(request, choice, self._clock())

    def _adopt(self, client: Client, message: Adopt) -> None:
        """Gives a retained request to this client, from its first token on. The client that had it is notified."""
        retained = self._retained.find(message.client_key, message.answer_id)
        if retained is not None and not (message.takes_over or retained.is_free):
            retained = None
        self._outbox(client, Adopted(message.stream, None if retained is None else retained.request))
        if retained is None:
            return
        deltas = retained.history.deltas(message.stream)
        request = self._open.get(retained.open_id)
        if request is None or request.retained is not retained:
            retained.detached_since = self._clock()
            paused = Finish("error", code=READER_PAUSED, message="the reader was paused: submit the request again")
            choices = retained.history.unfinished(retained.request.params.n)
            deltas += [TokenDelta(message.stream + choice, choice, b"", paused) for choice in choices]
        else:
            retained.detached_since = None
            moved = Finish("error", code=ADOPTED_BY_ANOTHER, message="the response continues on another connection")
            choices = sorted(request.unfinished)
            self._outbox(request.client, Deltas([TokenDelta(request.stream(c), c, b"", moved) for c in choices]))
            self._open.move(request, client, message.stream)
            log.info("request adopted by another client", extra=request.log_fields)
        if deltas:
            self._outbox(client, Deltas(deltas))

    def client_gone(self, client: Client) -> None:
        """A client disconnected: its requests are aborted and their KV freed at once, except for retained ones."""
        for request in self._open.of_client(client):
            if request.retained is not None and self._retained.holds(request.retained):
                request.retained.detached_since = self._clock()
                log.info("client disconnected; the request is retained and keeps running", extra=request.log_fields)
                continue
            log.info("request aborted: its client disconnected", extra=request.log_fields)
            self._abort_all(request)
        self._reports.pop(client, None)

    def _drop(self, retained: RetainedRequest) -> None:
        """It can no longer be adopted: if it has no client, it is aborted."""
        request = self._open.get(retained.open_id)
        if request is not None and request.retained is retained and retained.detached_since is not None:
            log.info("request aborted: no client adopted it in time", extra=request.log_fields)
            self._abort_all(request)

    def _abort_all(self, request: OpenRequest) -> None:
        for choice in sorted(request.unfinished):
            self._abort_stream(request.client, request.stream(choice))

    def _close_choice(self, request: OpenRequest, choice: int, finish: Finish) -> None:
        """Ends a choice without another token, and notifies its client."""
        self._open.send(request, choice, TokenDelta(request.stream(choice), choice, b"", finish))
        self._open.close_choice(request, choice, self._clock())

    # ------------------------------------------------------------------------------------------------ steps

    def step(self, poll: Callable[[float], None] | None = None) -> bool:
        """One turn: plan and send where the pipeline has room, then take the oldest result when it is full or nothing
        more can be planned. False: there is nothing to do until a message comes, or a lost worker is replaced.

        `poll(timeout_s)` waits for workers or clients and submits messages; without it a step waits for workers alone.
        Raises `EngineError` when the executor is lost for good; by then every open request has ended with the reason.
        """
        if self._failure is not None:
            return False
        self._expire()
        try:
            return self._has_recovered() and self._turn(poll)
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
        return self._failure is not None or self._supervisor.recovering

    @property
    def deadline_in_s(self) -> float | None:
        """In so many seconds, or earlier, `step` has to end a request whatever else comes; None where no request has a
        deadline."""
        deadlines_s = [request.deadline_s for request in self._open.with_deadline() if request.deadline_s is not None]
        return min(max(0.0, min(deadlines_s) - self._wall_clock()), _MAX_SLEEP_S) if deadlines_s else None

    def check(self) -> None:
        """For a loop without work: looks for a lost worker, and has it replaced."""
        if self._failure is None and not self._supervisor.recovering:
            try:
                self._executor.check()
            except WorkerDiedError as fault:
                self._supervisor.recover(fault)

    def _turn(self, poll: Callable[[float], None] | None) -> bool:
        scheduler, executor = self._scheduler, self._executor
        plan = scheduler.plan() if scheduler.num_uncommitted < executor.max_inflight_steps else None
        if plan is not None:
            self._note_plan(plan)
            self._supervisor.send(plan)
            if scheduler.num_uncommitted < executor.max_inflight_steps:
                return True
        if scheduler.num_uncommitted == 0:
            return False
        try:
            result = self._receive(poll)
        except TimeoutError:
            self._supervisor.investigate()
            return True
        except WorkerDiedError as fault:
            self._supervisor.recover(fault)
            return True
        self.counters.note_result(result)
        self._deliver(scheduler.commit(result))
        return True

    def _receive(self, poll: Callable[[float], None] | None) -> StepResult:
        """The oldest plan's result. Raises as `Supervisor.receive` does."""
        if poll is None:
            return self._supervisor.receive()
        limit_s = self._supervisor.limit_s()
        began_at = looked_at = self._clock()
        while True:
            with contextlib.suppress(TimeoutError):
                return self._supervisor.receive(0.0)
            now = self._clock()
            left_s = began_at + limit_s - now
            if left_s <= 0 or self._supervisor.sees_stopped_rank():
                raise TimeoutError(f"no step result within {limit_s:g} s, or the process of a rank is stopped")
            if now - looked_at >= LOOK_S:
                looked_at = now
                self._expire()
            poll(min(left_s, LOOK_S))

    def _note_plan(self, plan: StepPlan) -> None:
        self.counters.note_plan(plan)
        started = self._scheduler.take_started()
        if not started:
            return
        now = self._clock()
        for sequence in started:
            request = self._open.get(sequence.request.request_id)
            if request is not None:
                request.note_started(sequence.choice, now)
                if sequence.request.emitted:
                    self._open.send_start(request, sequence.choice)
        self._open.flush()  # before the step: if the driver dies in it, the client knows which requests were running

    def _has_recovered(self) -> bool:
        """Whether steps can run; after a fault they resume from the committed tokens."""
        if not self._supervisor.recovering:
            return True
        outcome = self._supervisor.outcome()
        if outcome is Outcome.RECOVERED:
            self._rewind()
        return outcome is not None

    def _rewind(self) -> None:
        scheduler = self._scheduler
        for request_id in scheduler.planned_requests():
            request = self._open[request_id]
            request.num_faults += 1
            if request.spans is not None:
                request.spans.fault()
            log.warning(
                "request was running when a worker failed (%d times so far); resuming from its tokens",
                request.num_faults,
                extra=request.log_fields,
            )
        self.counters.note_rewind()
        quarantined = [request for request in self._open if request.num_faults > 1]
        scheduler.rewind(self._supervisor.epoch, quarantined=[request.request_id for request in quarantined])
        for request in quarantined:
            if request.num_faults >= MAX_FAULTS_OF_REQUEST:
                message = (
                    f"workers failed {request.num_faults} times while this request was running, so it is not retried"
                )
                self._end(request, Finish("error", code="poison_request", message=message))
            request.num_survived_tokens = 0
        self._open.flush()

    def _note_survival(self, request: OpenRequest, num_tokens: int) -> None:
        """Counts tokens of a request in quarantine, and releases it after enough of them."""
        request.num_survived_tokens += num_tokens
        if (
            request.num_survived_tokens >= QUARANTINE_TOKENS
            and request.num_quarantine_releases < MAX_QUARANTINE_RELEASES
        ):
            request.num_quarantine_releases += 1
            request.num_faults = 1
            self._scheduler.quarantine.release(request.request_id)

    def _deliver(self, updates: list[SequenceUpdate]) -> None:
        open_requests, now, num_tokens = self._open, self.counters.progress_at, 0
        for update in updates:
            choice = update.sequence.choice
            request = open_requests.get(update.sequence.request.request_id)
            if request is None or choice not in request.unfinished:
                continue
            num_tokens += len(update.token_ids)
            if request.num_faults > 1:
                self._note_survival(request, len(update.token_ids))
            times = request.take_times(choice, now) if request.started_at else None
            open_requests.send(request, choice, _delta(request.first_stream + choice, update, times))
            if update.finish is not None:
                open_requests.close_choice(request, choice, now)
                if update.finish.reason == "error" and request.unfinished:
                    self._end(request, update.finish)
        self.counters.note_tokens(num_tokens)
        open_requests.flush()

    # ------------------------------------------------------------------------------------------------ ends

    def _expire(self) -> None:
        self._retained.expire(self._clock())
        with_deadline = self._open.with_deadline()
        if not with_deadline:
            return
        now = self._wall_clock()
        # While all rows are taken, who waits too long to be finished in time takes none from who can be.
        token_s = 0.0 if self._scheduler.num_free_rows else self._admission.token_s
        for request in with_deadline:
            assert request.deadline_s is not None
            if request.deadline_s <= now:
                message = "the request's deadline passed before it was finished"
            elif token_s and request.deadline_s < now + token_s * request.max_tokens and request.is_queued:
                message = "the request waited too long to finish before its deadline"
            else:
                continue
            self._end(request, Finish("error", code="deadline_exceeded", message=message))
        self._open.flush()

    def _end(self, request: OpenRequest, finish: Finish) -> None:
        """Ends its unfinished choices."""
        log.warning("request ended (%s): %s", finish.code, finish.message, extra=request.log_fields)
        for choice in sorted(request.unfinished):
            self._scheduler.abort_sequence(request.sequences[choice])
            self._close_choice(request, choice, finish)

    def fail(self, error: EngineError) -> None:
        """The executor is lost: every open request ends with the reason, and new ones are refused with it."""
        self._failure = error
        for request in self._open:
            self._end(request, Finish("error", code=error.code, message=str(error)))
        self._open.flush()

    def stats(self, ticket: int = 0) -> EngineStats:
        """Counters and gauges as they stand."""
        return self.counters.stats(ticket, str(self._failure or ""))


def _delta(stream: int, update: SequenceUpdate, times: Times | None) -> TokenDelta:
    return TokenDelta(
        stream=stream,
        choice=update.sequence.choice,
        token_ids=pack_ids(update.token_ids),
        finish=update.finish,
        logprobs=update.logprobs,
        prompt_logprobs=update.prompt_logprobs,
        num_cached_tokens=update.num_cached_tokens,
        times=times,
    )
