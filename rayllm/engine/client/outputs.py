"""From what Python callers pass to `Request`s, and from deltas back to `RequestOutput`s."""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from rayllm.errors import EngineError
from rayllm.messages import Finish, TokenDelta, TokenLogprobs
from rayllm.prompt.prompts import PreparedPrompt
from rayllm.request import (
    CompletionOutput,
    Logprob,
    OutputError,
    Request,
    RequestMetrics,
    RequestOutput,
    unpack_ids,
)
from rayllm.text.detokenizer import ChoiceText
from rayllm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def read_logprobs(packed: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """vLLM's shape: by token id; the sampled token with its own rank, the most likely ones with theirs."""
    ids, values = unpack_ids(packed.ids), array("f")
    values.frombytes(packed.values)
    found: dict[int, Logprob] = {}
    for place, (token_id, value) in enumerate(zip(ids, values, strict=True)):
        rank = packed.rank if place == 0 else place
        text = tokenizer.token_text(token_id) if tokenizer else None
        found.setdefault(token_id, Logprob(value, rank, text))
    return found


def raise_failed(output: CompletionOutput) -> None:
    """Raises `EngineError` where the engine gave the choice up."""
    if output.error is not None:
        raise EngineError(output.error.message, code=output.error.code)


def settle(outputs: Sequence[RequestOutput]) -> None:
    """Raises `EngineError` where the engine gave every choice of a call up; warns of those where it was some."""
    choices = [choice for output in outputs for choice in output.outputs]
    failed = [choice for choice in choices if choice.error is not None]
    if failed and len(failed) == len(choices):
        raise_failed(failed[0])
    if failed:
        assert failed[0].error is not None
        log.warning(
            "%d of %d outputs ended with finish_reason 'error'; the first: %s",
            len(failed), len(choices), failed[0].error.message,
        )  # fmt: skip


@dataclass
class _Choice:
    output: CompletionOutput
    text: ChoiceText | None
    done: bool = False


@dataclass
class OutputBuilder:
    """Collects one request's deltas. `push` says which choices the caller should abort: those that a stop string
    ended."""

    request: Request
    prompt: PreparedPrompt
    tokenizer: Tokenizer
    started_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        params = self.request.params
        self._choices = [
            _Choice(
                CompletionOutput(index=i, text="", token_ids=[]),
                ChoiceText(self.tokenizer, params, self.prompt.token_ids) if params.detokenize else None,
            )
            for i in range(params.n)
        ]
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._metrics = RequestMetrics()

    @property
    def finished(self) -> bool:
        return all(choice.done for choice in self._choices)

    def push(self, choice_index: int, delta: TokenDelta) -> tuple[CompletionOutput, bool]:
        """Adds a delta. Returns what it added (text, ids, logprobs, finish) and whether a stop string ended the choice,
        so that the engine must be told. Where the engine gave the choice up, its finish reason is `error`."""
        choice, params = self._choices[choice_index], self.request.params
        added = CompletionOutput(index=choice_index, text="", token_ids=[])
        if choice.done:
            return added, False
        self._note_times(delta)
        ids = list(unpack_ids(delta.token_ids))
        stopped = False
        if choice.text is not None:
            by_token = delta.finish is not None and delta.finish.has_stop_token
            added.text = choice.text.push(ids, stop_token=by_token)
            stopped = choice.text.stop_reason is not None
            if stopped:
                ids = ids[: choice.text.num_tokens_used - len(choice.output.token_ids)]
        added.token_ids = ids
        if params.num_logprobs is not None and delta.logprobs:
            added.logprobs = [read_logprobs(packed, self.tokenizer) for packed in delta.logprobs[: len(ids)]]
            added.cumulative_logprob = sum(entry[i].logprob for entry, i in zip(added.logprobs, ids, strict=True))
        if stopped:
            assert choice.text is not None
            added.finish_reason, added.stop_reason = "stop", choice.text.stop_reason
        elif delta.finish is not None:
            self._finish(choice, delta.finish, added)
        self._merge(choice, added)
        return added, stopped and delta.finish is None

    def _note_times(self, delta: TokenDelta) -> None:
        elapsed_s = time.monotonic() - self.started_s
        if self._metrics.first_token_s is None:
            self._metrics.first_token_s = elapsed_s
        self._metrics.finished_s = elapsed_s
        self._metrics.num_cached_tokens = max(self._metrics.num_cached_tokens, delta.num_cached_tokens)
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = [None, *(read_logprobs(packed, self.tokenizer) for packed in delta.prompt_logprobs)]

    def _finish(self, choice: _Choice, finish: Finish, added: CompletionOutput) -> None:
        added.finish_reason, added.stop_reason = finish.reason, finish.stop_reason
        if finish.reason == "error":
            message, code = finish.message or "the engine failed to complete the request", finish.code or "engine_error"
            added.error = OutputError(message, code)
        if choice.text is not None:
            added.text += choice.text.finish()

    def _merge(self, choice: _Choice, added: CompletionOutput) -> None:
        output = choice.output
        output.text += added.text
        output.token_ids += added.token_ids
        if added.logprobs is not None:
            output.logprobs = (output.logprobs or []) + added.logprobs
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + (added.cumulative_logprob or 0.0)
        if added.finish_reason is not None:
            output.finish_reason, output.stop_reason = added.finish_reason, added.stop_reason
            output.error = added.error
            choice.done = True

    def output(self) -> RequestOutput:
        """Everything so far."""
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.prompt.text,
            prompt_token_ids=self.prompt.token_ids,
            outputs=[choice.output for choice in self._choices],
            finished=self.finished,
            prompt_logprobs=self._prompt_logprobs,
            metrics=self._metrics,
        )
