"""How tokens are drawn, as a request asks for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from rayllm.request.ranges import MAX_INT32, check_int, check_number
from rayllm.request.structured_outputs import StructuredOutputsParams

MAX_SEED = 2**63 - 1
MAX_CHOICES = 128
DEFAULT_MAX_LOGPROBS = 20
MAX_LOGPROB_TOKEN_IDS = 128
MAX_STOP_STRINGS = 64
MAX_BAD_WORDS = 1024


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
        check_int("n", self.n, 1, MAX_CHOICES)
        check_number("presence_penalty", self.presence_penalty, -2, 2)
        check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        check_number("repetition_penalty", self.repetition_penalty, 0.01, 100, hint="; 1 is off")
        check_number("temperature", self.temperature, 0, 100, hint="; 0 is greedy")
        check_number("top_p", self.top_p, 0, 1, low_open=True, hint="; 1 is off")
        check_int("top_k", self.top_k, 0, MAX_INT32, hint="; 0 or -1 is off")
        check_number("min_p", self.min_p, 0, 1, hint="; 0 is off")
        if self.seed is not None:
            check_int("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
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
                check_int(f"{name}: token id", token_id, 0, MAX_INT32)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty: no token could be drawn; leave it out to allow all")
        for token_id, bias in self.logit_bias.items():
            check_number(f"logit_bias[{token_id}]", bias, -100, 100)
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1, MAX_INT32)
        check_int("min_tokens", self.min_tokens, 0, MAX_INT32)
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
            check_int("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, MAX_INT32, "; -1 is the context")
        check_int("priority", self.priority, -MAX_INT32 - 1, MAX_INT32)

    def _check_logprobs(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                check_int(name, value, -1, MAX_INT32, "; -1 is the whole vocabulary")
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
                check_int("bad_words_token_ids: token id", token_id, 0, MAX_INT32)

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
