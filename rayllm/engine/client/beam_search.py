"""Beam search over single-token requests: which token sequences to extend next, and which were the best.

`BeamSearch` computes nothing and waits for nothing, so that a blocking program and an event loop drive the same search:

    while search.prompts():
        search.advance([the output of a request with `step_params(params)` for each of search.prompts()])
    best = search.best()

A beam's score is its cumulative log-probability divided by (number of its tokens, the prompt's included, an
end-of-sequence token not counted) to the power of `length_penalty`: the definition of `transformers` and vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from rayllm.errors import ContextLengthError
from rayllm.request import DEFAULT_MAX_LOGPROBS, CompletionOutput, Logprob, SamplingParams

MAX_BEAM_WIDTH = DEFAULT_MAX_LOGPROBS // 2
"""Each beam is extended by its 2 x `beam_width` most likely tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamSearchParams:
    """How to search; checked at construction (`ValueError` names field, value and limit). Fields carry vLLM's names
    and meanings."""

    beam_width: int
    """Sequences that are kept after each token, and that are returned."""
    max_tokens: int
    ignore_eos: bool = False
    """Treat an end-of-sequence token as any other."""
    temperature: float = 0.0
    """Above 0, each beam is also extended by a token drawn at this temperature."""
    length_penalty: float = 1.0
    """Above 1 favours long answers, below 1 short ones."""
    include_stop_str_in_output: bool = False
    """Whether the text of an answer over HTTP holds its end-of-sequence token."""

    def __post_init__(self) -> None:
        for name, limit in (("beam_width", MAX_BEAM_WIDTH), ("max_tokens", 2**31 - 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an integer, got {value!r}")
            if not 1 <= value <= limit:
                raise ValueError(f"{name}={value} is outside [1, {limit}]")
        for name, low in (("temperature", 0), ("length_penalty", -100)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
            if not low <= value <= 100:
                raise ValueError(f"{name}={value!r} is outside [{low}, 100]")
        for name in ("ignore_eos", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")


@dataclass(slots=True)
class BeamSearchSequence:
    """One beam. `tokens` begins with the prompt; `logprobs` has an entry for each token after the prompt."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    """`"stop"` after an end-of-sequence token, `"length"` at `max_tokens`."""
    stop_reason: int | str | None = None
    """The id of the end-of-sequence token."""


@dataclass(slots=True)
class BeamSearchOutput:
    """What `LLM.beam_search` returns for a prompt: the best sequences, the best first."""

    sequences: list[BeamSearchSequence] = field(default_factory=list)


def step_params(params: BeamSearchParams) -> SamplingParams:
    """The sampling parameters of the request that extends a beam by one token."""
    return SamplingParams(
        max_tokens=1,
        temperature=params.temperature,
        logprobs=2 * params.beam_width,
        ignore_eos=True,
        detokenize=False,
        seed=0,
    )


class BeamSearch:
    """The search of one prompt. `max_model_len`: the context of the model. Raises `ContextLengthError` where prompt and
    `max_tokens` do not fit it."""

    def __init__(
        self,
        prompt_token_ids: Sequence[int],
        params: BeamSearchParams,
        eos_token_ids: Collection[int],
        max_model_len: int,
    ):
        num_prompt = len(prompt_token_ids)
        if num_prompt + params.max_tokens > max_model_len:
            raise ContextLengthError(
                f"This model's maximum context length is {max_model_len} tokens. However, the prompt has {num_prompt} "
                f"tokens and max_tokens={params.max_tokens} more were requested: shorten the prompt or lower "
                "max_tokens.",
                param="max_tokens",
            )
        self._params = params
        self._eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._num_steps = 0
        self._open = [BeamSearchSequence(list(prompt_token_ids), [])]
        self._completed: list[BeamSearchSequence] = []

    def prompts(self) -> list[list[int]]:
        """The token ids of each beam that is to be extended by one token; none when the search is over."""
        return [] if self._num_steps == self._params.max_tokens else [beam.tokens for beam in self._open]

    def advance(self, outputs: Sequence[CompletionOutput]) -> None:
        """Takes the outputs of single-token requests, in the order of `prompts`."""
        extended = []
        for beam, output in zip(self._open, outputs, strict=True):
            assert output.logprobs, "a request of a beam search has logprobs"
            for token_id, candidate in output.logprobs[0].items():
                if not math.isfinite(candidate.logprob):
                    continue
                longer = BeamSearchSequence(
                    [*beam.tokens, token_id],
                    [*beam.logprobs, output.logprobs[0]],
                    beam.cum_logprob + candidate.logprob,
                )
                if token_id in self._eos:
                    longer.finish_reason, longer.stop_reason = "stop", token_id
                    self._completed.append(longer)
                else:
                    extended.append(longer)
        self._num_steps += 1
        self._open = sorted(extended, key=self._score, reverse=True)[: self._params.beam_width]

    def best(self) -> list[BeamSearchSequence]:
        """The `beam_width` best of all sequences, the best first."""
        for beam in self._open:
            beam.finish_reason = beam.finish_reason or "length"
        found = [*self._completed, *self._open]
        return sorted(found, key=self._score, reverse=True)[: self._params.beam_width]

    def _score(self, beam: BeamSearchSequence) -> float:
        num_tokens = len(beam.tokens) - (beam.stop_reason is not None)
        return beam.cum_logprob / max(1, num_tokens) ** self._params.length_penalty
