"""`use_beam_search` of completions and chats: a stream that searches, and then sends its beams as choices.

Readers cannot distinguish it from an engine's own stream, so each response format is written as usual: choice i is the
i-th best beam, all of it in one delta.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from rayllm.api.errors import error_of
from rayllm.engine.client.beam_search import (
    MAX_BEAM_WIDTH,
    BeamSearch,
    BeamSearchParams,
    BeamSearchSequence,
    step_params,
)
from rayllm.engine.client.outputs import read_logprobs
from rayllm.engine.client.protocols import EngineClient, RequestStream
from rayllm.errors import EngineError, RequestError, shorten
from rayllm.messages import EngineStats, Finish, Times, TokenDelta, TokenLogprobs
from rayllm.request import CompletionOutput, Logprob, Request, SamplingParams, pack_ids

if TYPE_CHECKING:
    from rayllm.api.protocol import GenerationBody
    from rayllm.api.service import ServedModel

_WITHOUT_BEAMS = (
    "stop",
    "stop_token_ids",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "min_tokens",
    "prompt_logprobs",
    "logprob_token_ids",
    "structured_outputs",
)
"""Parameters that a beam search does not follow; they must be off."""


def with_beam_search(model: ServedModel, body: GenerationBody, params: SamplingParams) -> ServedModel:
    """The model, with an engine that answers a request of these parameters by beam search where the body asks for it.
    Raises `RequestError` that names a field which a search does not follow."""
    if not body.use_beam_search:
        if body.length_penalty not in (None, 1):
            raise RequestError("length_penalty needs use_beam_search=true", param="length_penalty")
        return model
    off = SamplingParams()
    for name in _WITHOUT_BEAMS:
        value = getattr(params, name)
        if value != getattr(off, name):
            raise RequestError(f"{name}={shorten(value)} is not supported with beam search", param=name)
    if getattr(body, "best_of", None) not in (None, body.n or 1):
        raise RequestError("best_of is not supported with beam search: n is its width", param="best_of")
    if params.n > MAX_BEAM_WIDTH:
        raise RequestError(f"n={params.n} is outside [1, {MAX_BEAM_WIDTH}] with beam search", param="n")
    if (params.logprobs or 0) > 2 * params.n:
        raise RequestError(
            f"logprobs={params.logprobs} is outside [0, {2 * params.n}] with beam search and n={params.n}",
            param="logprobs",
        )
    penalty = 1.0 if body.length_penalty is None else body.length_penalty
    config = model.config
    engine = BeamSearchClient(model.engine, penalty, config.shape.eos_token_ids, config.max_model_len)
    return replace(model, engine=engine)


@dataclass(frozen=True)
class BeamSearchClient:
    """An engine that answers each request by beam search; `n` is the width."""

    engine: EngineClient
    length_penalty: float
    eos_token_ids: Collection[int]
    max_model_len: int

    def submit(self, request: Request) -> BeamSearchStream:
        params = request.params
        try:
            search = BeamSearchParams(
                beam_width=params.n,
                max_tokens=request.max_tokens,
                ignore_eos=params.ignore_eos,
                temperature=params.temperature,
                length_penalty=self.length_penalty,
                include_stop_str_in_output=params.include_stop_str_in_output,
            )
        except ValueError as error:
            name = str(error).partition("=")[0]
            raise RequestError(str(error), param="n" if name == "beam_width" else name) from None
        found = BeamSearch(request.prompt_token_ids, search, self.eos_token_ids, self.max_model_len)
        return BeamSearchStream(self.engine, request, found, step_params(search))

    async def stats(self) -> EngineStats:
        return await self.engine.stats()

    async def adopt(self, client_key: str, answer_id: str, takes_over: bool = True) -> RequestStream | None:
        return await self.engine.adopt(client_key, answer_id, takes_over)

    def forget(self, client_key: str, answer_id: str) -> None:
        self.engine.forget(client_key, answer_id)


@dataclass
class BeamSearchStream:
    """The beams of one request, once the search is over."""

    engine: EngineClient
    request: Request
    search: BeamSearch
    step: SamplingParams
    _open: list[RequestStream] = field(default_factory=list)
    _times: Times | None = None
    _num_steps: int = 0

    def __aiter__(self) -> AsyncIterator[list[TokenDelta]]:
        return self._deltas()

    def abort_choice(self, choice: int) -> None:
        """Nothing: the beams are sent all at once."""

    def close(self) -> None:
        for stream in self._open:
            stream.close()
        self._open = []

    async def _deltas(self) -> AsyncIterator[list[TokenDelta]]:
        while prompts := self.search.prompts():
            self.search.advance(await self._extended(prompts))
        yield [self._delta(choice, beam) for choice, beam in enumerate(self.search.best())]

    async def _extended(self, prompts: Sequence[Sequence[int]]) -> list[CompletionOutput]:
        """The next token of each beam, with its log-probabilities."""
        self._num_steps += 1
        self._open = [self.engine.submit(self._step_request(i, prompt)) for i, prompt in enumerate(prompts)]
        try:
            return list(await asyncio.gather(*map(self._token, self._open)))
        finally:
            self.close()

    def _step_request(self, beam: int, prompt: Sequence[int]) -> Request:
        return msgspec.structs.replace(
            self.request,
            request_id=f"{self.request.request_id}-{self._num_steps}-{beam}",
            prompt=pack_ids(prompt),
            params=self.step,
            seed=self.request.seed ^ self._num_steps,
            max_tokens=1,
            retention=None,
        )

    async def _token(self, stream: RequestStream) -> CompletionOutput:
        async for deltas in stream:
            for delta in deltas:
                if delta.finish is not None and delta.finish.reason == "error":
                    raise error_of(delta.finish)
                self._times = self._times or delta.times
                if delta.logprobs:
                    entry = read_logprobs(delta.logprobs[0], None)
                    return CompletionOutput(0, "", [], logprobs=[entry])
        raise EngineError("a step of the beam search ended without a token", code="engine_stream_ended")

    def _delta(self, choice: int, beam: BeamSearchSequence) -> TokenDelta:
        new = beam.tokens[len(self.request.prompt_token_ids) :]
        num_top, logprobs = self.request.params.logprobs, None
        if num_top is not None:
            logprobs = [_packed(*pair, num_top) for pair in zip(new, beam.logprobs, strict=True)]
        finish = Finish(beam.finish_reason or "length")
        return TokenDelta(choice, choice, pack_ids(new), finish, logprobs, times=self._times if choice == 0 else None)


def _packed(token_id: int, candidates: dict[int, Logprob], num_top: int) -> TokenLogprobs:
    top = sorted(candidates, key=lambda each: candidates[each].rank)[:num_top]
    values: Any = array("f", [candidates[each].logprob for each in (token_id, *top)])
    return TokenLogprobs(pack_ids([token_id, *top]), values.tobytes(), candidates[token_id].rank)
