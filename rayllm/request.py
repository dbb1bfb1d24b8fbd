"""What a user asks for: sampling parameters, a request, and the text that answers it. Plain Python, no torch."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import msgspec

MAX_SEED = 2**63 - 1
MAX_CHOICES = 128
DEFAULT_MAX_LOGPROBS = 20
MAX_LOGPROB_TOKEN_IDS = 128
MAX_STOP_STRINGS = 64
MAX_BAD_WORDS = 1024


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

STRUCTURED_KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputsParams:
    """What the text of an answer must be: exactly one of the kinds is set. Fields carry vLLM's names and meanings.

    Checked at construction for shape alone (`ValueError`); whether a schema, regex or grammar can be followed is found
    by `rayllm.structured`.
    """

    json: str | None = None
    """A JSON schema as JSON text. A dict or a pydantic model class is written as text, its order kept."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = None
    """The whole text matches it."""
    choice: tuple[str, ...] | None = None
    """The text is one of these."""
    grammar: str | None = None
    """In llguidance's form of Lark, or GBNF."""
    structural_tag: str | None = None
    """Free text with tags whose contents follow schemas, as JSON text: `{"structures": [{"begin", "schema", "end"}],
    "triggers": [...]}`. A dict is written as text."""
    disable_any_whitespace: bool = False
    """JSON without whitespace between its parts; else a little is allowed."""

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "json", _json_text("json", self.json))
        set_field(self, "structural_tag", _json_text("structural_tag", self.structural_tag))
        if isinstance(self.choice, (list, tuple)):
            set_field(self, "choice", tuple(self.choice))
        for name in ("json_object", "disable_any_whitespace"):
            value = getattr(self, name)
            if not isinstance(value, (bool, type(None))):
                raise ValueError(f"{name} must be true or false, got {value!r}")
            set_field(self, name, bool(value))
        given = [name for name in STRUCTURED_KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs: {' and '.join(given) or 'nothing'} given; give exactly one of "
                + ", ".join(STRUCTURED_KINDS)
            )
        for name in ("regex", "grammar"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not text):
                raise ValueError(f"{name} must be a text of at least one character, got {text!r}")
        if self.choice is not None:
            self._check_choice(self.choice)

    def _check_choice(self, choice: Any) -> None:
        if not isinstance(choice, tuple) or not choice:
            raise ValueError("choice must be a list of at least one text")
        for text in choice:
            if not isinstance(text, str) or not text:
                raise ValueError(f"choice must hold texts of at least one character, got {text!r}")

    @property
    def kind(self) -> str:
        """Which of `STRUCTURED_KINDS` is set."""
        return next(name for name in STRUCTURED_KINDS if getattr(self, name) not in (None, False))


def _json_text(name: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if callable(schema_of := getattr(value, "model_json_schema", None)):
        value = schema_of()
    if not isinstance(value, (dict, bool)):
        raise ValueError(f"{name} must be a JSON schema (an object, or its text), got {type(value).__name__}")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be written as JSON: {error}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are drawn; checked at construction (`ValueError` names field, value and limit).

    Sampling is a pure function of (seed, choice, position): what else is in the batch never matters. Fields carry
    vLLM's names and meanings. `top_k=0` (or -1) is off, `max_tokens=None` means up to the model's context,
    `temperature=0` is greedy. `logprobs=k` gives the sampled token's log-probability and the k most likely tokens', as
    many as the engine's `max_logprobs` allows; -1 is the whole vocabulary.
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
    logprob_token_ids: tuple[int, ...] | None = None
    """Gives the log-probabilities of these tokens, in place of the most likely ones, beside the sampled token's."""
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    """Only True: tokenizers say themselves where spaces are."""
    truncate_prompt_tokens: int | None = None
    """Callers of Python: only the prompt's last so many tokens count; -1: as many as the context holds."""
    priority: int = 0
    """Callers of Python: lower is served first."""
    best_of: int | None = None
    """Only None or `n`: vLLM has removed it."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    bad_words: tuple[str, ...] = ()
    """Words that are not written: of the tokens that a word becomes, with a space before it and without, the last is
    not drawn where the others end the answer so far. A request holds them as `bad_words_token_ids` only."""
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    """The same as token ids, for callers that have no text."""

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # frozen: normal forms are written once, here
        if isinstance(self.structured_outputs, dict):
            set_field(self, "structured_outputs", StructuredOutputsParams(**self.structured_outputs))
        stop = self.stop
        set_field(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop or ()))
        set_field(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if isinstance(self.bad_words, list) or self.bad_words is None:
            set_field(self, "bad_words", tuple(self.bad_words or ()))
        if self.bad_words_token_ids or self.bad_words_token_ids is None:
            set_field(self, "bad_words_token_ids", tuple(map(tuple, self.bad_words_token_ids or ())))
        if self.allowed_token_ids is not None:
            set_field(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        if self.logprob_token_ids is not None:
            set_field(self, "logprob_token_ids", tuple(self.logprob_token_ids))
        set_field(self, "logit_bias", {int(k): float(v) for k, v in (self.logit_bias or {}).items()})
        if self.top_k == -1:
            set_field(self, "top_k", 0)
        self._check()

    def _check(self) -> None:
        if not isinstance(self.structured_outputs, (StructuredOutputsParams, type(None))):
            raise ValueError("structured_outputs must be a StructuredOutputsParams")
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
        self._check_bad_words()
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias", "logprob_token_ids"):
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
        self._check_logprobs()
        self._check_compatible()

    def _check_compatible(self) -> None:
        if self.spaces_between_special_tokens is not True:
            raise ValueError(
                f"spaces_between_special_tokens={self.spaces_between_special_tokens!r} is not supported: give True"
            )
        if self.best_of not in (None, self.n):
            raise ValueError(
                f"best_of={self.best_of!r} is not supported: ask for n={self.best_of!r} with logprobs=0 and take the "
                "outputs with the largest cumulative_logprob"
            )
        if self.truncate_prompt_tokens not in (None, -1):
            _check_int("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, _MAX_INT32, "; -1 is the context")
        _check_int("priority", self.priority, -_MAX_INT32 - 1, _MAX_INT32)

    def _check_logprobs(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_int(name, value, -1, _MAX_INT32, "; -1 is the whole vocabulary")
        ids = self.logprob_token_ids
        if ids is None:
            return
        if not 1 <= len(ids) <= MAX_LOGPROB_TOKEN_IDS:
            raise ValueError(f"logprob_token_ids holds {len(ids)} ids, 1 to {MAX_LOGPROB_TOKEN_IDS} are allowed")
        if len(set(ids)) < len(ids):
            raise ValueError("logprob_token_ids holds a token id twice")
        if self.logprobs not in (None, len(ids)):
            raise ValueError(
                f"logprobs={self.logprobs} and {len(ids)} logprob_token_ids: they are given in place of the most "
                "likely tokens; leave logprobs out"
            )

    def _check_bad_words(self) -> None:
        if not isinstance(self.bad_words, tuple):
            raise ValueError(f"bad_words must be a list of words, got {self.bad_words!r}")
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise ValueError(f"bad_words has {len(self.bad_words)} words, at most {MAX_BAD_WORDS} are allowed")
        for word in self.bad_words:
            if not isinstance(word, str) or not word:
                raise ValueError(f"bad_words must hold non-empty strings, got {word!r}")
        for ids in self.bad_words_token_ids:
            if not ids:
                raise ValueError("bad_words_token_ids must hold words of at least one token id")
            for token_id in ids:
                _check_int("bad_words_token_ids: token id", token_id, 0, _MAX_INT32)

    @property
    def num_logprobs(self) -> int | None:
        """How many log-probabilities a sampled token brings beside its own; None for not even that."""
        return self.logprobs if self.logprob_token_ids is None else len(self.logprob_token_ids)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, with no randomness."""
        return self.temperature == 0

    def with_(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)


class Retention(msgspec.Struct, frozen=True, array_like=True):
    """Has the driver retain a request that outlives its client (`engine.driver.retained_requests`)."""

    answer_id: str
    """The name by which a client adopts it, together with the request's `client_key`."""
    response_context: bytes
    """What an ingress needs to rebuild the response from the tokens; opaque to the driver."""
    in_background: bool = False
    """No client reads it while it runs: any client may adopt it."""
    history: bytes = b""
    """The deltas that a previous, lost driver had sent: an encoded `engine.delta_history.DeltaHistory`."""


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
    log_id: str = ""
    """What log lines call it in every process: the client's `x-request-id`."""
    traceparent: str = ""
    """W3C trace context of the span that it belongs to; empty where nothing is traced."""
    retention: Retention | None = None
    """Set where it outlives its client."""

    @property
    def prompt_token_ids(self) -> array[int]:
        return unpack_ids(self.prompt)


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


TokenIds = Sequence[int]


class TextPrompt(TypedDict):
    """A prompt as text, in vLLM's form."""

    prompt: str


class _PromptText(TypedDict, total=False):
    prompt: str


class TokensPrompt(_PromptText):
    """A prompt as token ids, in vLLM's form; `prompt` is the text that they came from, where it is known."""

    prompt_token_ids: list[int]
