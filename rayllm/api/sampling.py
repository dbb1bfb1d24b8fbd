"""From the fields of a body to `SamplingParams` and `Request`, with errors in the client's names."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rayllm.api.protocol import (
    MAX_BAD_WORD_CHARACTERS,
    MAX_CACHE_SALT_CHARACTERS,
    MAX_LOGIT_BIASES,
    MAX_STOP_CHARACTERS,
    MAX_TOKEN_ID_LIST,
    GenerationBody,
)
from rayllm.api.structured import structured_outputs
from rayllm.config import ResolvedConfig
from rayllm.errors import RequestError, shorten
from rayllm.prompt.requests import build_request, resolve_params
from rayllm.request import MAX_SEED, Request, SamplingParams

if TYPE_CHECKING:
    from rayllm.api.service import ServedModel

_PLAIN_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "bad_words",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "prompt_logprobs",
    "allowed_token_ids",
    "logprob_token_ids",
)
"""Fields that `SamplingParams` takes as they are; null is the model's default, or else its own."""
_MIN_REPETITION_PENALTY = 0.01
_MAX_TEMPERATURE = 2
"""OpenAI's limit; `SamplingParams` allows more."""
_TOKEN_ID = re.compile(r"[0-9]{1,10}", re.ASCII)
_MAX_NAMED = 10
"""Wrong keys of an object that a message names."""
_MAX_PRIORITY = 2**31 - 1
MAX_TIMEOUT_S = 7 * 24 * 3600


def sampling_params(body: GenerationBody, model: ServedModel, **settled: Any) -> SamplingParams:
    """The body's parameters, in the model's tokens; `settled` are those that its endpoint worked out (`max_tokens`,
    `logprobs`, ...)."""
    vocab_size = model.vocab_size
    fields = model.config.generation.sampling_fields()
    fields |= {name: value for name in _PLAIN_FIELDS if (value := getattr(body, name)) is not None}
    _check_stop(body.stop)
    _check_bad_words(body.bad_words or ())
    for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
        limit = vocab_size if name == "allowed_token_ids" else MAX_TOKEN_ID_LIST
        _check_ids(name, getattr(body, name) or (), vocab_size, limit)
    if body.temperature is not None and body.temperature > _MAX_TEMPERATURE:
        raise RequestError(
            f"temperature={body.temperature:g} is outside [0, {_MAX_TEMPERATURE:g}]; 0 is greedy", param="temperature"
        )
    penalty = body.repetition_penalty
    if penalty is not None and penalty < _MIN_REPETITION_PENALTY:
        raise RequestError(
            f"repetition_penalty={penalty:g} is less than {_MIN_REPETITION_PENALTY:g}; 1 is off",
            param="repetition_penalty",
        )
    if body.logit_bias:
        fields["logit_bias"] = _logit_bias(body.logit_bias, vocab_size)
    if "structured_outputs" not in settled:
        fields["structured_outputs"] = structured_outputs(body)
    try:
        params = SamplingParams(**{**fields, **settled})
    except ValueError as error:
        raise RequestError(str(error), param=_field_named(str(error))) from None
    return resolve_params(params, model.config, model.tokenizer)


def num_further_characters(body: GenerationBody) -> int:
    """About as many characters of a prompt as the body's bad words take to tokenize."""
    return sum(2 * len(word) + 64 for word in body.bad_words or ())


def _field_named(message: str) -> str | None:
    """`SamplingParams` begins its messages with the field's name."""
    first = re.match(r"[a-z_]+", message)
    return first.group() if first and first.group() in SamplingParams.__dataclass_fields__ else None


def _check_stop(stop: str | Sequence[str] | None) -> None:
    for text in (stop,) if isinstance(stop, str) else stop or ():
        if len(text) > MAX_STOP_CHARACTERS:
            raise RequestError(
                f"stop: a string of {len(text)} characters is longer than {MAX_STOP_CHARACTERS}", param="stop"
            )


def _check_bad_words(words: Sequence[str]) -> None:
    num_characters = sum(map(len, words))
    if num_characters > MAX_BAD_WORD_CHARACTERS:
        raise RequestError(
            f"bad_words has {num_characters} characters in all, at most {MAX_BAD_WORD_CHARACTERS} are allowed",
            param="bad_words",
        )


def _check_ids(name: str, ids: Sequence[int], vocab_size: int, limit: int) -> None:
    if len(ids) > limit:
        raise RequestError(f"{name} holds {len(ids)} ids, at most {limit} are allowed", param=name)
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{name}: {shorten(token_id)} is out of vocabulary, which has {vocab_size} tokens", param=name
            )


def _logit_bias(biases: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    if len(biases) > MAX_LOGIT_BIASES:
        raise RequestError(
            f"logit_bias holds {len(biases)} tokens, at most {MAX_LOGIT_BIASES} are allowed", param="logit_bias"
        )
    texts = [key for key in biases if not _TOKEN_ID.fullmatch(key)]
    outside = [key for key in biases if _TOKEN_ID.fullmatch(key) and int(key) >= vocab_size]
    faults = []
    if texts:
        faults.append(f"{_listed(texts)} {'is not a token id' if len(texts) == 1 else 'are not token ids'}")
    if outside:
        is_or_are = "is" if len(outside) == 1 else "are"
        faults.append(f"{_listed(outside)} {is_or_are} out of vocabulary, which has {vocab_size} tokens")
    if faults:
        raise RequestError(f"logit_bias: {'; '.join(faults)}", param="logit_bias")
    return {int(key): bias for key, bias in biases.items()}


def _listed(keys: Sequence[str]) -> str:
    """All of them where they are few."""
    shown = ", ".join(shorten(key) for key in keys[:_MAX_NAMED])
    return shown + (f" and {len(keys) - _MAX_NAMED} more" if len(keys) > _MAX_NAMED else "")


def truncate_ids(ids: list[int], body: GenerationBody, max_model_len: int) -> list[int]:
    """The ids that `truncate_prompt_tokens` and `truncation_side` leave (-1: as many as the context holds)."""
    num_tokens = body.truncate_prompt_tokens
    if num_tokens is None:
        return ids
    if num_tokens != -1 and not 1 <= num_tokens <= max_model_len:
        raise RequestError(
            f"truncate_prompt_tokens={num_tokens} is outside [1, {max_model_len}]; -1 means {max_model_len}",
            param="truncate_prompt_tokens",
        )
    num_kept = max_model_len if num_tokens == -1 else num_tokens
    return ids[:num_kept] if body.truncation_side == "right" else ids[-num_kept:]


def request_of_body(
    request_id: str,
    token_ids: Sequence[int],
    params: SamplingParams,
    body: GenerationBody,
    config: ResolvedConfig,
    default_max_tokens: int | None = None,
    client_key: str = "",
) -> Request:
    """A complete request. `default_max_tokens` holds where the client asks for no number, as far as there is
    room; None: the model's default. `client_key`: whose it is, for fair shares."""
    return build_request(
        request_id,
        token_ids,
        params,
        config,
        default_seed=secrets.randbelow(MAX_SEED),
        default_max_tokens=config.generation.max_tokens if default_max_tokens is None else default_max_tokens,
        max_tokens_limit=config.generation.max_tokens_limit,
        priority=_priority(body.priority),
        cache_salt=_cache_salt(body.cache_salt),
        deadline_s=_deadline_s(body.timeout),
        client_key=client_key,
    )


def _priority(priority: int | None) -> int:
    if not -_MAX_PRIORITY <= (priority or 0) <= _MAX_PRIORITY:
        raise RequestError(f"priority={shorten(priority)} does not fit 32 bits", param="priority")
    return priority or 0


def _deadline_s(timeout_s: float | None) -> float | None:
    if timeout_s is None:
        return None
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise RequestError(f"timeout={timeout_s:g} is outside (0, {MAX_TIMEOUT_S}] seconds", param="timeout")
    return time.time() + timeout_s


def _cache_salt(salt: str | None) -> str:
    if salt is None:
        return ""
    if not 1 <= len(salt) <= MAX_CACHE_SALT_CHARACTERS:
        raise RequestError(
            f"cache_salt has {len(salt)} characters, 1 to {MAX_CACHE_SALT_CHARACTERS} are allowed", param="cache_salt"
        )
    return salt
