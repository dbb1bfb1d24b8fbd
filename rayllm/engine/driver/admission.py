"""What a driver checks of a request before it queues it: the last backlog, for callers that did not check."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

from rayllm.config import ResolvedConfig
from rayllm.errors import ContextLengthError, OverloadedError, RequestError
from rayllm.request import Request, SamplingParams
from rayllm.scheduler.fairness import Backlog
from rayllm.scheduler.scheduler import Scheduler

MAX_RETRY_AFTER_S = 600.0
_MIN_RETRY_AFTER_S = 1.0
ASSUMED_STEP_S = {"cpu": 0.05, "cuda": 0.02}
"""What a step is taken to last before any was measured."""
_MEMORY_S = 10.0
_BACKLOG_WATCH_S = 2.0
_NUM_KNOWN_STEPS = 8
_WAIT_SHARE = 0.8
"""Of the time that a deadline leaves: as both wait and run are estimates, a queue filled to the brim with requests that
might just make it would end many of them on their last tokens."""


def check_request(request: Request, config: ResolvedConfig) -> None:
    """Raises `RequestError` when the request's ids or lengths do not fit the model."""
    prompt, vocab_size = request.prompt_token_ids, config.shape.vocab_size
    if not prompt:
        raise RequestError("the prompt is empty: give at least one token", param="prompt")
    for token_id in (min(prompt), max(prompt)):
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"prompt token id {token_id} is out of vocabulary: ids are 0 to {vocab_size - 1}", param="prompt"
            )
    params = request.params
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias", "logprob_token_ids"):
        for token_id in getattr(params, name) or ():
            if token_id >= vocab_size:
                raise RequestError(
                    f"{name} holds {token_id}, which is out of vocabulary: ids are 0 to {vocab_size - 1}", param=name
                )
    if params.bad_words:
        raise RequestError("bad_words must have become bad_words_token_ids where the tokenizer is", param="bad_words")
    if any(token_id >= vocab_size for word in params.bad_words_token_ids for token_id in word):
        raise RequestError(
            f"bad_words_token_ids holds an id that is out of vocabulary: ids are 0 to {vocab_size - 1}",
            param="bad_words_token_ids",
        )
    if request.max_tokens < 1:
        raise RequestError(f"max_tokens={request.max_tokens} leaves no answer: give at least 1", param="max_tokens")
    resolve_max_tokens(len(prompt), request.max_tokens, config.max_model_len)
    if params.min_tokens > request.max_tokens:
        raise RequestError(
            f"min_tokens={params.min_tokens} is more than max_tokens={request.max_tokens}", param="min_tokens"
        )


def resolve_logprobs(params: SamplingParams, config: ResolvedConfig) -> SamplingParams:
    """The parameters with a number in the place of -1, the whole vocabulary. Raises `RequestError` for more than
    `max_logprobs`."""
    vocab_size = config.shape.vocab_size
    limit = vocab_size if config.engine.max_logprobs == -1 else config.engine.max_logprobs
    changes = {}
    for name in ("logprobs", "prompt_logprobs"):
        asked: int | None = getattr(params, name)
        if asked is None:
            continue
        num = vocab_size if asked == -1 else asked
        if num > limit:
            whole = f", the whole vocabulary of {vocab_size}," if asked == -1 else ""
            raise RequestError(
                f"{name}={asked}{whole} is outside [0, {limit}]; the server's operator raises that with --max-logprobs",
                param=name,
            )
        if asked == -1:
            changes[name] = num
    return params.with_(**changes) if changes else params


def resolve_max_tokens(num_prompt_tokens: int, max_tokens: int | None, max_model_len: int) -> int:
    """New tokens a request may have: what it asked for, or all that the context leaves.

    Raises `ContextLengthError` when prompt and `max_tokens` do not fit.
    """
    room = max_model_len - num_prompt_tokens
    if room < 1 or (max_tokens is not None and max_tokens > room):
        asked = "" if max_tokens is None else f" and max_tokens={max_tokens} asks for more than the {max(0, room)} left"
        raise ContextLengthError(
            f"This model's maximum context length is {max_model_len} tokens, the prompt has {num_prompt_tokens}"
            f"{asked}: shorten the prompt or lower max_tokens",
            param="prompt" if room < 1 else "max_tokens",
        )
    return room if max_tokens is None else max_tokens


class Recent:
    """What some totals grew by over the last `_MEMORY_S` seconds or so, and the seconds that count."""

    def __init__(self, now: float, totals: Sequence[int]):
        self.seconds = 0.0
        self.growth = [0.0] * len(totals)
        self._looked_at, self._totals = now, totals

    def look(self, now: float, totals: Sequence[int], *, counts: bool = True) -> None:
        """Adds what came since the last look, where that `counts`."""
        if counts:
            elapsed_s = now - self._looked_at
            kept = max(0.0, 1.0 - elapsed_s / _MEMORY_S)
            self.seconds = self.seconds * kept + elapsed_s
            news = zip(self.growth, totals, self._totals, strict=True)
            self.growth = [value * kept + total - before for value, total, before in news]
        self._looked_at, self._totals = now, totals


class Pace:
    """How fast waiting sequences come to run and to their end, in times in which some always wait: only those say what
    the engine can do. Looked at when requests come: it costs a step nothing.

    `typical_step_s` says how long steps have taken at any time, None before the first; then they are taken to last
    `assumed_step_s`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        clock: Callable[[], float],
        typical_step_s: Callable[[], float | None] = lambda: None,
        assumed_step_s: float = ASSUMED_STEP_S["cpu"],
        num_batched_tokens: int = 2048,
    ):
        self._scheduler = scheduler
        self._clock = clock
        self._typical_step_s = typical_step_s
        self._assumed_step_s = assumed_step_s
        self._num_batched_tokens = num_batched_tokens
        self._num_slack_plans = scheduler.totals.num_slack_plans
        self._all = Recent(clock(), self._read())
        self._backlogs: WeakKeyDictionary[Backlog, Recent] = WeakKeyDictionary()

    def _read(self) -> Sequence[int]:
        totals = self._scheduler.totals
        return (
            totals.num_started_tokens,
            self._scheduler.num_plans,
            totals.num_ended_tokens,
            totals.num_ended_max_tokens,
        )

    def look(self, backlog: Backlog | None = None) -> None:
        """Takes what happened since the last look into account, in `backlog` too."""
        scheduler, now = self._scheduler, self._clock()
        always_some = len(scheduler.waiting) > 0 and scheduler.totals.num_slack_plans == self._num_slack_plans
        self._all.look(now, self._read(), counts=always_some)
        self._num_slack_plans = scheduler.totals.num_slack_plans
        if backlog is not None:
            started = (backlog.num_started_tokens,)
            self._backlogs.setdefault(backlog, Recent(now, started)).look(now, started)

    def wait_s(self, backlog: Backlog | None, num_tokens_ahead: int) -> float | None:
        """Seconds until one that joins `backlog` comes to run; None before anything was measured.

        A backlog that was watched for a while says itself how fast it moves: those who come later may be served before
        it. Else it is the time for `num_tokens_ahead`.
        """
        if backlog is not None:
            recent = self._backlogs[backlog]
            if recent.seconds >= _BACKLOG_WATCH_S and recent.growth[0]:
                return backlog.num_tokens * recent.seconds / recent.growth[0]
        started_tokens = self._all.growth[0]
        return num_tokens_ahead * self._all.seconds / started_tokens if started_tokens else None

    def run_s(self, max_tokens: int) -> float:
        """Seconds that a sequence of `max_tokens` will run: a step for each token, and it comes to as large a part of
        them as others did. 0 before anything was measured."""
        return self._run_s(max_tokens) if self._all.growth[1] and self._all.growth[3] else 0.0

    def _run_s(self, num_tokens: float) -> float:
        """The same, of what is known or else assumed."""
        _, _, ended_tokens, ended_max_tokens = self._all.growth
        return num_tokens * (ended_tokens / ended_max_tokens if ended_max_tokens else 1.0) * self._step_s

    @property
    def _step_s(self) -> float:
        num_steps = self._all.growth[1]
        if num_steps >= _NUM_KNOWN_STEPS:
            return self._all.seconds / num_steps
        return self._typical_step_s() or self._assumed_step_s

    def work_s(self, num_tokens_ahead: int, num_max_tokens_ahead: int) -> float:
        """Seconds until one comes to run before which so many prompt tokens, and tokens that those may have, wait:
        what runs and what waits, shared by the rows that compute at once."""
        scheduler = self._scheduler
        num_waiting, num_waiting_tokens = len(scheduler.waiting), scheduler.waiting.num_prompt_tokens
        num_fitting = scheduler.num_free_slots * num_waiting // max(1, num_waiting_tokens)
        num_rows = max(1, scheduler.num_running + min(scheduler.num_free_rows, num_waiting, num_fitting))
        num_tokens = (scheduler.num_tokens_left + num_max_tokens_ahead) / num_rows
        return self._run_s(num_tokens) + num_tokens_ahead / self._num_batched_tokens * self._step_s

    def trust(self, max_tokens: int) -> float:
        """From 0 to 1: how far `wait_s` counts against `work_s`. What came to run is a measure once it was watched for
        as long as sequences run: those that began together before say nothing of when the next ones will."""
        return min(1.0, self._all.seconds / max(1e-9, self._run_s(max_tokens)))


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
        self._pace = Pace(scheduler, clock, typical_step_s, assumed_step_s, config.max_num_batched_tokens)
        self._scheduler = scheduler
        self._wall_clock = wall_clock

    @property
    def token_s(self) -> float:
        """Seconds that each token which a request may have is expected to take once it runs; 0 before anything was
        measured."""
        return self._pace.run_s(1)

    def check(self, request: Request) -> None:
        """Raises `OverloadedError` for what is too much now. A request that is continued was let in before."""
        backlog = self._scheduler.waiting.backlog(request.client_key, request.priority)
        self._pace.look(backlog)
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
        queue, pace = self._scheduler.waiting, self._pace
        of_whom = request.client_key, request.priority
        num_max_tokens = request.max_tokens * request.params.n
        num_tokens_ahead = queue.num_tokens_ahead(*of_whom, num_tokens)
        measured_s = pace.wait_s(backlog, num_tokens_ahead)
        work_s = pace.work_s(num_tokens_ahead, queue.num_max_tokens_ahead(*of_whom, num_max_tokens))
        if measured_s is None:
            return None, work_s
        trust = pace.trust(request.max_tokens)
        return measured_s, trust * measured_s + (1 - trust) * work_s

    def _check_bound(self, name: str, num_queued: int, num_own: int, client: str, wait_s: float) -> None:
        limit: int | None = getattr(self._config, name)
        if limit is None or num_queued <= limit:
            return
        if num_own * self._scheduler.waiting.num_clients_with(client) <= limit and num_queued <= 2 * limit:
            return
        retry_after_s = min(max(wait_s, _MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
        raise OverloadedError(
            f"the engine's queue is full: with this request {num_queued} would wait, {name}={limit}; come back in "
            f"about {math.ceil(retry_after_s)} s",
            retry_after_s,
            name,
        )

    def _check_deadline(self, request: Request, wait_s: float | None) -> None:
        if request.deadline_s is None or wait_s is None:
            return
        left_s = request.deadline_s - self._wall_clock()
        run_s = self._pace.run_s(request.max_tokens)
        if wait_s >= _WAIT_SHARE * left_s or wait_s + run_s >= left_s:
            raise OverloadedError(
                f"the request cannot be finished in the {max(0.0, left_s):.1f} s that its deadline leaves: about "
                f"{wait_s:.1f} s of other work wait before it, and it would run for {run_s:.1f} s; come back later or "
                "allow more time",
                min(wait_s, MAX_RETRY_AFTER_S),
                "deadline",
            )
