"""What a driver checks of a request before it queues it: the last line, for callers that did not check."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

from rayllm.config import ResolvedConfig
from rayllm.errors import ContextLengthError, OverloadedError, RequestError
from rayllm.request import Request, SamplingParams
from rayllm.scheduler.fairness import Line
from rayllm.scheduler.scheduler import Scheduler

MAX_RETRY_AFTER_S = 600.0
_UNKNOWN_WAIT_S = 1.0
_MEMORY_S = 10.0
_LINE_WATCH_S = 2.0
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
            raise RequestError(f"prompt token id {token_id} is outside the vocabulary of {vocab_size}", param="prompt")
    params = request.params
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias", "logprob_token_ids"):
        for token_id in getattr(params, name) or ():
            if token_id >= vocab_size:
                raise RequestError(f"{name} holds {token_id}, outside the vocabulary of {vocab_size}", param=name)
    if params.bad_words:
        raise RequestError("bad_words must have become bad_words_token_ids where the tokenizer is", param="bad_words")
    if any(token_id >= vocab_size for word in params.bad_words_token_ids for token_id in word):
        raise RequestError(
            f"bad_words_token_ids holds an id outside the vocabulary of {vocab_size}", param="bad_words_token_ids"
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
    """

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float]):
        self._scheduler = scheduler
        self._clock = clock
        self._num_slack_plans = scheduler.totals.num_slack_plans
        self._all = Recent(clock(), self._read())
        self._lines: WeakKeyDictionary[Line, Recent] = WeakKeyDictionary()

    def _read(self) -> Sequence[int]:
        totals = self._scheduler.totals
        return (
            totals.num_started_tokens,
            self._scheduler.num_plans,
            totals.num_ended_tokens,
            totals.num_ended_max_tokens,
        )

    def look(self, line: Line | None = None) -> None:
        """Takes what happened since the last look into account, in `line` too."""
        scheduler, now = self._scheduler, self._clock()
        always_some = len(scheduler.waiting) > 0 and scheduler.totals.num_slack_plans == self._num_slack_plans
        self._all.look(now, self._read(), counts=always_some)
        self._num_slack_plans = scheduler.totals.num_slack_plans
        if line is not None:
            started = (line.num_started_tokens,)
            self._lines.setdefault(line, Recent(now, started)).look(now, started)

    def wait_s(self, line: Line | None, num_tokens_ahead: int) -> float | None:
        """Seconds until one that joins `line` comes to run; None before anything was measured.

        A line that was watched for a while says itself how fast it moves: those who come later may be served before
        it. Else it is the time for `num_tokens_ahead`.
        """
        if line is not None:
            recent = self._lines[line]
            if recent.seconds >= _LINE_WATCH_S and recent.growth[0]:
                return line.num_tokens * recent.seconds / recent.growth[0]
        started_tokens = self._all.growth[0]
        return num_tokens_ahead * self._all.seconds / started_tokens if started_tokens else None

    def run_s(self, max_tokens: int) -> float:
        """Seconds that a sequence of `max_tokens` will run: a step for each token, and it comes to as large a part of
        them as others did."""
        _, num_steps, ended_tokens, ended_max_tokens = self._all.growth
        if not num_steps or not ended_max_tokens:
            return 0.0
        return max_tokens * ended_tokens / ended_max_tokens * self._all.seconds / num_steps


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
    ):
        self._config = config.engine
        self._pace = Pace(scheduler, clock)
        self._scheduler = scheduler
        self._wall_clock = wall_clock

    @property
    def token_s(self) -> float:
        """Seconds that each token which a request may have is expected to take once it runs; 0 before anything was
        measured."""
        return self._pace.run_s(1)

    def check(self, request: Request) -> None:
        """Raises `OverloadedError` for what is too much now. A request that is continued was let in before."""
        line = self._scheduler.waiting.line(request.client_key, request.priority)
        self._pace.look(line)
        if request.emitted:
            return
        num_sequences, num_tokens = request.params.n, len(request.prompt) // 4 * request.params.n
        scheduler, queue, client = self._scheduler, self._scheduler.waiting, request.client_key
        num_queued = len(queue) + num_sequences - scheduler.num_free_rows
        num_queued_tokens = queue.num_prompt_tokens + num_tokens - scheduler.num_free_slots
        if not len(queue) or (num_queued <= 0 and num_queued_tokens <= 0):
            return
        wait_s = self._pace.wait_s(line, queue.num_tokens_ahead(client, request.priority, num_tokens))
        own, own_tokens = queue.num_waiting_of(client)
        self._check_bound("max_queued_requests", num_queued, own + num_sequences, client, wait_s)
        self._check_bound("max_queued_tokens", num_queued_tokens, own_tokens + num_tokens, client, wait_s)
        self._check_deadline(request, wait_s)

    def _check_bound(self, name: str, num_queued: int, num_own: int, client: str, wait_s: float | None) -> None:
        limit: int | None = getattr(self._config, name)
        if limit is None or num_queued <= limit:
            return
        if num_own * self._scheduler.waiting.num_clients_with(client) <= limit and num_queued <= 2 * limit:
            return
        retry_after_s = _UNKNOWN_WAIT_S if wait_s is None else min(wait_s, MAX_RETRY_AFTER_S)
        raise OverloadedError(
            f"the engine's queue is full: with this request {num_queued} would wait, {name}={limit}; come back in "
            f"about {max(1, math.ceil(retry_after_s))} s",
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
