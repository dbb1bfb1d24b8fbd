"""What a user asks for: sampling parameters, a request, and the text that answers it. Plain Python, no torch."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

MAX_SEED = 2**63 - 1
MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token ids (or block ids, or row numbers) as little-endian int32: how they travel and how they are hashed."""
    return array("i", ids).tobytes()


def unpack_ids(packed: bytes) -> array[int]:
    """The inverse of `pack_ids`, as an `array('i')`."""
    ids = array("i")
    ids.frombytes(packed)
    return ids


def _check_number(name: str, value: Any, low: float, high: float, *, low_open: bool = False, mend: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    inside = (low < value if low_open else low <= value) and value <= high
    if not math.isfinite(value) or not inside:
        bracket = "(" if low_open else "["
        raise ValueError(f"{name}={value!r} is outside {bracket}{low:g}, {high:g}]{mend}")


def _check_int(name: str, value: Any, low: int, high: int, mend: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}={value} is outside [{low}, {high}]{mend}")


_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are drawn; checked at construction (`ValueError` names field, value and limit).

    Sampling is a pure function of (seed, choice, position): what else is in the batch never matters. Fields carry
    vLLM's names and meanings. `top_k=0` (or -1) is off, `max_tokens=None` means up to the model's context,
    `temperature=0` is greedy. `logprobs=k` gives the sampled token's log-probability and the k most likely tokens'.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # frozen: normal forms are written once, here
        stop = self.stop
        set_field(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop or ()))
        set_field(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if self.allowed_token_ids is not None:
            set_field(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        set_field(self, "logit_bias", {int(k): float(v) for k, v in (self.logit_bias or {}).items()})
        if self.top_k == -1:
            set_field(self, "top_k", 0)
        self._check()

    def _check(self) -> None:
        _check_int("n", self.n, 1, MAX_CHOICES)
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100, mend="; 1 is off")
        _check_number("temperature", self.temperature, 0, 100, mend="; 0 is greedy")
        _check_number("top_p", self.top_p, 0, 1, low_open=True, mend="; 1 is off")
        _check_int("top_k", self.top_k, 0, _MAX_INT32, mend="; 0 or -1 is off")
        _check_number("min_p", self.min_p, 0, 1, mend="; 0 is off")
        if self.seed is not None:
            _check_int("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop has {len(self.stop)} strings, at most {MAX_STOP_STRINGS} are allowed")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop must hold non-empty strings, got {text!r}")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need text: leave detokenize on, or use stop_token_ids")
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token_id in getattr(self, name) or ():
                _check_int(f"{name}: token id", token_id, 0, _MAX_INT32)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty: no token could be drawn; leave it out to allow all")
        for token_id, bias in self.logit_bias.items():
            _check_number(f"logit_bias[{token_id}]", bias, -100, 100)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, _MAX_INT32)
        _check_int("min_tokens", self.min_tokens, 0, _MAX_INT32)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_int(name, value, 0, MAX_LOGPROBS)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, with no randomness."""
        return self.temperature == 0

    def with_(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the ingress asks of a driver: token ids and numbers only, complete, never changed.

    Its choices are `params.n` token streams. `seed` and `max_tokens` are resolved by whoever submits (a request
    replayed after a fault must draw the same numbers). `emitted` holds, per choice, the ids already sent, when a
    request is continued; they count against `max_tokens`.
    """

    request_id: str
    prompt: bytes
    """int32 token ids, see `pack_ids`; never empty."""
    params: SamplingParams
    seed: int
    max_tokens: int
    """New tokens allowed for each choice; prompt + max_tokens fits the model's context."""
    priority: int = 0
    """Lower is served first (vLLM's convention); equal priorities in order of arrival."""
    cache_salt: str = ""
    """Prefix-cache blocks are shared only among requests with the same salt."""
    deadline_s: float | None = None
    """Unix time after which the request is ended."""
    emitted: tuple[bytes, ...] = ()
    client_key: str = ""
    """Whose request it is: clients with the same priority get equal shares of the engine."""

    @property
    def prompt_token_ids(self) -> array[int]:
        return unpack_ids(self.prompt)


@dataclass(slots=True)
class Logprob:
    """One candidate of a position: natural-log probability, and its rank among all tokens (1 is the most likely)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One choice of a request, as far as it has come."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    """`"stop"`, `"length"`, `"abort"` or None while it runs."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for the end-of-sequence token."""


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


TokenIds = Sequence[int]
