"""What a request brings: text, tokens, log-probabilities and times, by vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """One candidate of a position: natural-log probability, and its rank among all tokens (1 is the most likely)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class OutputError:
    """Why the engine gave a choice up, in words and as a machine-readable word (`invalid_logits`, ...)."""

    message: str
    code: str


@dataclass(slots=True)
class CompletionOutput:
    """One choice of a request, as far as it has come."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    """`"stop"`, `"length"`, `"abort"`, `"error"`, or None while it runs."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for the end-of-sequence token."""
    error: OutputError | None = None
    """Why it ended, where `finish_reason` is `"error"`; text and ids are what came before."""


@dataclass(slots=True)
class RequestMetrics:
    """Seconds since the request arrived; None until it happened."""

    first_token_s: float | None = None
    finished_s: float | None = None
    num_cached_tokens: int = 0


@dataclass(slots=True)
class RequestOutput:
    """What `LLM.generate` returns for a prompt: vLLM's names."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
