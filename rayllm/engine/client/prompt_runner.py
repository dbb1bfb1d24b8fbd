"""Prompts to answers for programs that block: what `LLM` does for each of its calls, from any number of threads."""

from __future__ import annotations

import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rayllm.config import ResolvedConfig
from rayllm.engine.client.beam_search import BeamSearch, BeamSearchOutput, BeamSearchParams, step_params
from rayllm.engine.client.engine_thread import Call, EngineThread
from rayllm.engine.client.outputs import OutputBuilder, raise_failed, settle
from rayllm.errors import RequestError
from rayllm.messages import TokenDelta
from rayllm.prompt.prompts import PreparedPrompt, truncated
from rayllm.prompt.requests import derived_seed, program_request
from rayllm.request import CompletionOutput, Request, RequestOutput, SamplingParams
from rayllm.text.tokenizer import Tokenizer

ShowsProgress = bool | Callable[..., Any]
"""Whether to show a progress bar, or what makes one (as `tqdm.tqdm`)."""


class PromptRunner:
    """Submits requests to an engine that other threads use too, each call as if it were alone."""

    def __init__(self, engine: EngineThread[Any], config: ResolvedConfig, tokenizer: Tokenizer):
        self.engine = engine
        self._config = config
        self._tokenizer = tokenizer
        self._num_unseeded = 0
        self._lock = threading.Lock()

    def run(
        self, prompts: Sequence[PreparedPrompt], params: Sequence[SamplingParams], shows_progress: ShowsProgress = False
    ) -> list[RequestOutput]:
        """The answers, in the order of the prompts. Raises as `LLM.generate` does."""
        builders, call = self._submit(prompts, params)
        each = (builder for builder in builders for _ in range(builder.request.params.n))
        owners = dict(zip(call.streams, each, strict=True))
        progress = _progress(len(builders), shows_progress)
        num_open = len(builders)
        try:
            while num_open:
                for delta in call.receive():
                    builder = owners[delta.stream]
                    was_finished = builder.finished
                    _, ended_by_text = builder.push(delta.choice, delta)
                    if ended_by_text:
                        call.abort(delta.stream)
                    if builder.finished and not was_finished:
                        num_open -= 1
                        progress.update(1)
        finally:
            call.close()
            progress.close()
        outputs = [builder.output() for builder in builders]
        settle(outputs)
        return outputs

    def stream(self, prompt: PreparedPrompt, params: SamplingParams) -> AnswerStream:
        """One prompt's answer as it comes."""
        [builder], call = self._submit([prompt], [params])
        return AnswerStream(builder, call)

    def beam_search(
        self,
        prompts: Sequence[PreparedPrompt],
        params: BeamSearchParams,
        shows_progress: ShowsProgress = False,
        max_concurrency: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The best sequences of each prompt; `max_concurrency` prompts at a time (default: all)."""
        eos, limit = self._config.shape.eos_token_ids, self._config.max_model_len
        searches = [BeamSearch(prompt.token_ids, params, eos, limit) for prompt in prompts]
        size = max_concurrency or len(searches) or 1
        progress = _progress(len(searches), shows_progress)
        try:
            for start in range(0, len(searches), size):
                self._search(searches[start : start + size], step_params(params))
                progress.update(len(searches[start : start + size]))
        finally:
            progress.close()
        outputs = [BeamSearchOutput(search.best()) for search in searches]
        for output in outputs:
            for beam in output.sequences:
                beam.text = self._tokenizer.decode(beam.tokens)
        return outputs

    def _search(self, searches: Sequence[BeamSearch], step: SamplingParams) -> None:
        while beams := [(search, tokens) for search in searches for tokens in search.prompts()]:
            outputs = self.run([PreparedPrompt(None, tokens) for _, tokens in beams], [step] * len(beams))
            for search in searches:
                extended = [o.outputs[0] for (owner, _), o in zip(beams, outputs, strict=True) if owner is search]
                for output in extended:
                    raise_failed(output)
                if extended:
                    search.advance(extended)

    def request(self, prompt: PreparedPrompt, params: SamplingParams) -> Request:
        """A complete request. Raises `RequestError` where it does not fit."""
        seed = 0
        if params.seed is None and not params.greedy:
            seed = derived_seed(self._config.engine.seed, self._num_unseeded)
            self._num_unseeded += 1
        return program_request(uuid.uuid4().hex, prompt.token_ids, params, self._config, self._tokenizer, seed)

    def _submit(
        self, prompts: Sequence[PreparedPrompt], params: Sequence[SamplingParams]
    ) -> tuple[list[OutputBuilder], Call]:
        """Builds all requests, then submits them: a fault in one starts none."""
        limit = self._config.max_model_len
        prompts = [truncated(prompt, p, limit) for prompt, p in zip(prompts, params, strict=True)]
        with self._lock:  # the seeds of a call's requests follow one another
            requests = [self.request(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
        builders = [OutputBuilder(r, p, self._tokenizer) for r, p in zip(requests, prompts, strict=True)]
        return builders, self.engine.open(requests)


class AnswerStream(Iterator[CompletionOutput]):
    """One prompt's answer as it comes: each item holds what was added to its choice (`index`).

    Leaving it, `close` (from any thread; whoever waits for the next item leaves the loop) and the end of a `with` block
    end the request. Raises `EngineError` when the engine is lost or gives a choice up."""

    def __init__(self, builder: OutputBuilder, call: Call):
        self._builder = builder
        self._call = call
        self._deltas: deque[TokenDelta] = deque()
        self._lock = threading.Lock()
        self._is_closed = False

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> CompletionOutput:
        with self._lock:  # several threads may share the items of a stream
            try:
                while not (self._is_closed or self._builder.finished):
                    added = self._take()
                    if added.token_ids or added.text or added.finish_reason:
                        return added
            except BaseException:
                self.close()
                raise
        self.close()
        raise StopIteration

    def _take(self) -> CompletionOutput:
        """What the next delta adds."""
        if not self._deltas:
            self._deltas += self._call.receive()
            if not self._deltas:
                raise StopIteration  # closed meanwhile
        delta = self._deltas.popleft()
        added, ended_by_text = self._builder.push(delta.choice, delta)
        raise_failed(added)
        if ended_by_text:
            self._call.abort(delta.stream)
        return added

    def close(self) -> None:
        """Ends the request. Idempotent."""
        self._is_closed = True
        self._call.close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def per_prompt(params: SamplingParams | Sequence[SamplingParams], num_prompts: int) -> Sequence[SamplingParams]:
    """One set of sampling parameters for each prompt. Raises `RequestError` for another number of them."""
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    listed = list(params) if isinstance(params, Sequence) else [params]
    for given in listed:
        if not isinstance(given, SamplingParams):
            raise RequestError(
                f"sampling_params must be a SamplingParams or a list of them, got {type(given).__name__}",
                param="sampling_params",
            )
    if len(listed) != num_prompts:
        raise RequestError(f"{len(listed)} sampling_params for {num_prompts} prompts: give one, or one for each")
    return listed


def _progress(total: int, shown: ShowsProgress) -> Any:
    from tqdm.auto import tqdm

    make = shown if callable(shown) else tqdm
    return make(total=total, desc="Processed prompts", disable=None if shown else True, dynamic_ncols=True)
