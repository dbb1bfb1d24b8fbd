"""One HTTP request while it runs: its engine requests, their choices, and the text that comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence

import msgspec

from rayllm.api import resume_context
from rayllm.api.choice import Choice, Parsing, new_choice
from rayllm.api.errors import error_of
from rayllm.api.offload import in_turns
from rayllm.engine.client.protocols import EngineClient, RequestStream
from rayllm.errors import EngineError
from rayllm.messages import ADOPTED_BY_ANOTHER, TokenDelta, TokenLogprobs, single_tokens
from rayllm.observability.metrics import Metrics
from rayllm.observability.request_context import current_request
from rayllm.request import Request
from rayllm.text.tokenizer import Tokenizer

_TURN_S = 0.01
"""How long an answer whose deltas wait already takes them before others get a turn."""
_NUM_SHORT = 1024
_NUM_A_TURN = 64
"""Choices that are opened, or closed, before others get a turn."""
_Arrival = tuple[int, list[TokenDelta]] | Exception | None
"""A stream's number and deltas; what it raised; or its end."""


class Generation:
    """The requests of one HTTP request; `close` must be called in `finally`. They are submitted at construction, or
    `start` submits the rest of many.

    Choices are numbered prompt by prompt: those of prompt p are p * n to p * n + n - 1.
    """

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        metrics: Metrics,
        requests: Sequence[Request],
        answer_id: str,
        parsing: Parsing | None = None,
    ):
        continued = resume_context.current() if len(requests) == 1 else None
        if continued is not None:
            requests = [_continued(requests[0], answer_id, continued)]
        self._goes_by_tokens = requests[0].retention is not None
        self._metrics = metrics
        self._started_s = time.perf_counter()
        self._first: tuple[int, list[TokenDelta]] | None = None
        self._context = current_request.get()
        if self._context is not None:
            span = self._context.span
            traceparent = span.traceparent if span is not None else ""
            requests = [
                msgspec.structs.replace(request, log_id=self._context.request_id, traceparent=traceparent)
                for request in requests
            ]
            if span is not None:
                span.prepared(_span_attributes(metrics.model_name, requests))
        self._closed = False
        self._failed = False
        self.is_adopted_by_another = False
        self.requests = requests
        self.prompt_ids = [list(request.prompt_token_ids) for request in requests]
        self.num_choices = requests[0].params.n
        self._engine, self._tokenizer, self._parsing = engine, tokenizer, parsing
        self.choices: list[Choice] = []
        """All of them once `start` was called."""
        self.prompt_logprobs: list[list[TokenLogprobs] | None] = [None] * len(requests)
        self._num_cached = [0] * len(requests)
        self._num_unfinished = len(requests) * self.num_choices
        self._num_unfinished_of = [self.num_choices] * len(requests)
        self._prompts_done: set[int] = set()
        self._streams: list[RequestStream] = []
        self._arrivals = _Arrivals(self._streams)
        metrics.request_opened()
        try:
            self._open_some(None if continued is None else continued.adopted)
        except BaseException:
            self.close()
            raise

    def _open_some(self, adopted: RequestStream | None = None) -> None:
        """Submits the next requests, as many as one turn of the event loop may hold."""
        first = len(self._streams)
        for number in range(first, min(first + max(1, _NUM_A_TURN // self.num_choices), len(self.requests))):
            request = self.requests[number]
            self.choices += [
                new_choice(number * self.num_choices + i, number, self._tokenizer, request, self._parsing)
                for i in range(self.num_choices)
            ]
            self._streams.append(self._engine.submit(request) if adopted is None else adopted)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompt_ids))

    @property
    def num_cached_tokens(self) -> int:
        return sum(self._num_cached)

    @property
    def num_generated_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices)

    @property
    def num_reasoning_tokens(self) -> int:
        return sum(choice.num_reasoning_tokens for choice in self.choices)

    @property
    def is_long(self) -> bool:
        """Whether it takes long to write all of it down: many choices, a long prompt, many log-probabilities."""
        num_scored = sum(len(choice.logprobs) for choice in self.choices)
        num_scored += sum(len(scored) for scored in self.prompt_logprobs if scored is not None)
        return len(self.choices) + num_scored > _NUM_SHORT or self.num_prompt_tokens > 8 * _NUM_SHORT

    async def start(self) -> None:
        """Waits for the engine's first word, so that a refusal can still be an HTTP status."""
        while len(self._streams) < len(self.requests) and not self._closed:
            await asyncio.sleep(0)
            self._open_some()
        self._first = await self._next()
        if self._first is not None:
            for delta in self._first[1]:
                if delta.finish is not None and delta.finish.reason == "error":
                    self._failed = True
                    raise error_of(delta.finish)

    async def _next(self) -> tuple[int, list[TokenDelta]] | None:
        try:
            return await self._arrivals.next()
        except EngineError:
            self._failed = True
            raise

    async def batches(self) -> AsyncIterator[list[tuple[Choice, str]]]:
        """What each step brought (each token, of a request that is kept): choices with new text or an end. Ends when
        every choice has ended."""
        if self._first is None:
            await self.start()
        batch = self._first
        turn_began_s = time.perf_counter()
        while batch is not None:
            prompt_index, deltas = batch
            parts = [[one] for delta in deltas for one in single_tokens(delta)] if self._goes_by_tokens else [deltas]
            for part in parts:
                news: dict[Choice, str] = {}
                for delta in part:
                    self._take(prompt_index, delta, news)
                if news:
                    yield list(news.items())
                if not self._num_unfinished:
                    return
            if time.perf_counter() - turn_began_s > _TURN_S:
                await asyncio.sleep(0)
                turn_began_s = time.perf_counter()
            batch = await self._next()
        raise EngineError("the engine's stream ended before the answer did", code="engine_stream_ended")

    async def finished(self) -> None:
        """Waits until every choice has ended."""
        async for _ in self.batches():
            pass

    def close(self) -> None:
        """Aborts what is unfinished. May be called again."""
        if self._closed:
            return
        self._closed = True
        self._arrivals.close()
        if self._context is not None:
            self._context.num_prompt_tokens += self.num_prompt_tokens
            self._context.num_generated_tokens += self.num_generated_tokens
            if self._context.span is not None:
                self._context.span.has_failed |= self._failed
        self._metrics.request_closed()
        in_turns(self._close_some())

    def _close_some(self) -> Iterator[None]:
        """Aborts what is unfinished; between its parts others may have a turn."""
        for number, stream in enumerate(self._streams):
            stream.close()
            for choice in self.choices[number * self.num_choices : (number + 1) * self.num_choices]:
                if choice.finish_reason is None:
                    self._note_end(choice, "error" if self._failed else "abort")
            if (number + 1) * self.num_choices % _NUM_A_TURN < self.num_choices:
                yield

    def _take(self, prompt_index: int, delta: TokenDelta, news: dict[Choice, str]) -> None:
        choice = self.choices[prompt_index * self.num_choices + delta.choice]
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs[prompt_index] = delta.prompt_logprobs
        if delta.num_cached_tokens:
            self._num_cached[prompt_index] = delta.num_cached_tokens
        if choice.finish_reason is not None:
            return
        num_before = len(choice.token_ids)
        try:
            text = choice.take(delta)
        except Exception:
            self._failed = True
            self.is_adopted_by_another = delta.finish is not None and delta.finish.code == ADOPTED_BY_ANOTHER
            raise
        if delta.token_ids:
            self._note_token(choice, delta, len(choice.token_ids) - num_before)
        if choice.finish_reason is not None:
            self._end(choice, delta)
        if text or choice.finish_reason is not None:
            news[choice] = news.get(choice, "") + text

    def _note_token(self, choice: Choice, delta: TokenDelta, num_tokens: int) -> None:
        now_s, metrics = time.perf_counter(), self._metrics
        metrics.tokens_generated(num_tokens)
        if choice.first_token_s is None:
            choice.first_token_s = now_s
            metrics.first_token(now_s - self._started_s, delta.times)
            if self._context is not None and self._context.span is not None:
                self._context.span.first_token(delta.times)
            if delta.times is not None:
                choice.queued_s, choice.prefill_s = delta.times.queued_s, delta.times.prefill_s
            self._note_prompt(choice.prompt_index)
        else:
            metrics.next_token(now_s - choice.last_token_s)
        choice.last_token_s = now_s

    def _note_prompt(self, index: int) -> None:
        if index not in self._prompts_done:
            self._prompts_done.add(index)
            self._metrics.prompt_done(len(self.prompt_ids[index]), self._num_cached[index], self.num_choices)

    def _end(self, choice: Choice, delta: TokenDelta) -> None:
        self._num_unfinished -= 1
        if delta.finish is None:
            self._streams[choice.prompt_index].abort_choice(delta.choice)
        self._note_end(choice, str(choice.finish_reason))

    def _note_end(self, choice: Choice, reason: str) -> None:
        index, now_s = choice.prompt_index, time.perf_counter()
        self._metrics.choice_finished(
            reason,
            len(choice.token_ids),
            self.requests[index].max_tokens,
            elapsed_s=now_s - self._started_s,
            decode_s=choice.last_token_s - (choice.first_token_s or choice.last_token_s),
            prefill_s=choice.prefill_s,
        )
        self._num_unfinished_of[index] -= 1
        if not self._num_unfinished_of[index]:
            siblings = self.choices[index * self.num_choices : (index + 1) * self.num_choices]
            self._metrics.request_finished(max(len(sibling.token_ids) for sibling in siblings))


def _continued(request: Request, answer_id: str, continued: resume_context.ResumeContext) -> Request:
    """The request as it is kept: the one that is kept already, of an answer that is made again."""
    if continued.adopted is not None:
        return continued.adopted.request
    return msgspec.structs.replace(request, retention=continued.keep(answer_id))


def _span_attributes(model_name: str, requests: Sequence[Request]) -> dict[str, str | int | float]:
    params = requests[0].params
    return {
        "gen_ai.request.model": model_name,
        "gen_ai.response.model": model_name,
        "gen_ai.request.n": params.n,
        "gen_ai.request.max_tokens": requests[0].max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.usage.num_sequences": params.n * len(requests),
    }


class _Arrivals:
    """The deltas of all streams as they come, each with its stream's number. No generator: one that is left before its
    end costs the event loop a task, to close it.
    """

    def __init__(self, streams: Sequence[RequestStream]):
        self._streams = streams
        self._single: AsyncIterator[list[TokenDelta]] | None = None
        self._arrived: asyncio.Queue[_Arrival] | None = None
        self._pumps: list[asyncio.Task[None]] = []
        self._start: asyncio.Task[None] | None = None
        self._num_open = 0

    async def next(self) -> tuple[int, list[TokenDelta]] | None:
        """None when all streams have ended."""
        if len(self._streams) == 1:
            self._single = self._single or aiter(self._streams[0])
            try:
                return 0, await anext(self._single)
            except StopAsyncIteration:
                return None
        if self._arrived is None:
            self._arrived = asyncio.Queue(len(self._streams))  # beyond it they wait: the engine sees who does not read
            self._num_open = len(self._streams)
            self._start = asyncio.create_task(self._start_pumps(self._arrived))
        while self._num_open:
            arrival = await self._arrived.get()
            if isinstance(arrival, Exception):
                raise arrival
            if arrival is not None:
                return arrival
            self._num_open -= 1
        return None

    async def _start_pumps(self, arrived: asyncio.Queue[_Arrival]) -> None:
        for number, stream in enumerate(self._streams):
            self._pumps.append(asyncio.create_task(_pump(number, stream, arrived)))
            if len(self._pumps) % _NUM_A_TURN == 0:
                await asyncio.sleep(0)

    def close(self) -> None:
        if self._start is not None:
            self._start.cancel()
        for pump in self._pumps:
            pump.cancel()


async def _pump(number: int, stream: RequestStream, arrived: asyncio.Queue[_Arrival]) -> None:
    try:
        async for deltas in stream:
            await arrived.put((number, deltas))
        await arrived.put(None)
    except Exception as error:
        await arrived.put(error)
