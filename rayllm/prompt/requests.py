"""Token ids and sampling parameters to a complete `Request`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache

from rayllm.config import ResolvedConfig
from rayllm.errors import RequestError
from rayllm.request import Request, SamplingParams, StructuredOutputsParams, pack_ids
from rayllm.request.checks import check_request, resolve_logprobs, resolve_max_tokens
from rayllm.structured.grammar import check_grammar
from rayllm.text.bad_words import with_bad_word_ids
from rayllm.text.tokenizer import Tokenizer


def resolve_params(params: SamplingParams, config: ResolvedConfig, tokenizer: Tokenizer) -> SamplingParams:
    """The parameters in the model's tokens: bad words as ids, -1 log-probabilities as a number. Raises `RequestError`
    for what this model or tokenizer cannot do."""
    params = resolve_logprobs(params, config)
    tokenizer.check_params(params)
    if not params.bad_words:
        return params
    with named_as({"prompt": "bad_words"}):
        return with_bad_word_ids(params, tokenizer, config.shape.vocab_size)


def build_request(
    request_id: str,
    token_ids: Sequence[int],
    params: SamplingParams,
    config: ResolvedConfig,
    *,
    default_seed: int,
    default_max_tokens: int | None = None,
    max_tokens_limit: int | None = None,
    priority: int = 0,
    cache_salt: str = "",
    deadline_s: float | None = None,
    client_key: str = "",
) -> Request:
    """A complete request; `params` are those of `resolve_params`. Raises `RequestError` where it does not fit the
    model.

    Without `max_tokens` the answer may have `default_max_tokens`, or else all that the context leaves;
    `max_tokens_limit` lowers what is asked for. `default_seed` holds where the parameters bring none. `client_key`:
    whose request it is, for fair shares.
    """
    asked = params.max_tokens
    if asked is not None and max_tokens_limit is not None:
        asked = min(asked, max_tokens_limit)
    max_tokens = resolve_max_tokens(len(token_ids), asked, config.max_model_len)
    bounds = (max_tokens, max_tokens_limit, default_max_tokens if asked is None else None)
    try:
        prompt = pack_ids(token_ids)
    except OverflowError:
        raise RequestError("a prompt token id does not fit 32 bits", param="prompt") from None
    request = Request(
        request_id=request_id,
        prompt=prompt,
        params=params,
        seed=default_seed if params.seed is None else params.seed,
        max_tokens=min(bound for bound in bounds if bound is not None),
        priority=priority,
        cache_salt=cache_salt,
        deadline_s=deadline_s,
        client_key=client_key,
    )
    check_request(request, config)
    return request


def program_request(
    request_id: str,
    token_ids: Sequence[int],
    params: SamplingParams,
    config: ResolvedConfig,
    tokenizer: Tokenizer,
    default_seed: int,
) -> Request:
    """The request of a Python program, whose parameters say everything. Errors are those of `build_request`."""
    params = resolve_params(params, config, tokenizer)
    request = build_request(request_id, token_ids, params, config, default_seed=default_seed, priority=params.priority)
    if params.structured_outputs is not None:
        _check_structured_outputs(params.structured_outputs)
    return request


@lru_cache(maxsize=256)
def _check_structured_outputs(structured: StructuredOutputsParams) -> None:
    """Raises `RequestError` for a grammar that cannot be followed. For programs, which are trusted: servers try
    grammars in a process of their own (`structured.trial`)."""
    check_grammar(structured)


def derived_seed(seed: int, number: int) -> int:
    """The seed of an engine's `number`-th request that brought none: well mixed, and the same in every run."""
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@contextmanager
def named_as(names: Mapping[str, str]) -> Iterator[None]:
    """Errors inside name fields as this client called them: `{ours: theirs}`."""
    try:
        yield
    except RequestError as error:
        ours = error.param or ""
        if ours in names:
            error.param = names[ours]
            error.message = re.sub(rf"^{ours}\b", names[ours], error.message)
            error.args = (error.message,)
        raise
