"""Whether a request fits the model. Clients check it for an early error, and the driver again for clients that do
not."""

from __future__ import annotations

from rayllm.config import ResolvedConfig
from rayllm.errors import ContextLengthError, RequestError
from rayllm.request import Request, SamplingParams


def check_request(request: Request, config: ResolvedConfig) -> None:
    """Raises `RequestError` when the request's ids or lengths do not fit the model."""
    prompt, vocab_size = request.prompt_token_ids, config.shape.vocab_size
    if not prompt:
        raise RequestError("the prompt is empty: give at least one token", param="prompt")
    for token_id in (min(prompt), max(prompt)):
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"prompt token id {token_id} is out of vocabulary, which has {vocab_size} tokens", param="prompt"
            )
    params = request.params
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias", "logprob_token_ids"):
        for token_id in getattr(params, name) or ():
            if token_id >= vocab_size:
                raise RequestError(
                    f"{name} holds {token_id}, out of vocabulary, which has {vocab_size} tokens", param=name
                )
    if params.bad_words:
        raise RequestError(
            "bad_words must be converted to bad_words_token_ids by the client, which has the tokenizer",
            param="bad_words",
        )
    if any(token_id >= vocab_size for word in params.bad_words_token_ids for token_id in word):
        raise RequestError(
            f"bad_words_token_ids holds an id out of vocabulary, which has {vocab_size} tokens",
            param="bad_words_token_ids",
        )
    if request.max_tokens < 1:
        raise RequestError(f"max_tokens={request.max_tokens} is below the minimum of 1", param="max_tokens")
    resolve_max_tokens(len(prompt), request.max_tokens, config.max_model_len)
    if params.min_tokens > request.max_tokens:
        raise RequestError(
            f"min_tokens={params.min_tokens} is more than max_tokens={request.max_tokens}", param="min_tokens"
        )


def resolve_logprobs(params: SamplingParams, config: ResolvedConfig) -> SamplingParams:
    """The parameters with a number in the place of -1, the whole vocabulary. Raises `RequestError` for more than
    `max_logprobs`."""
    vocab_size = config.shape.vocab_size
    limit = vocab_size if config.engine.max_logprobs == -1 else config.engine.max_logprobs
    changes = {}
    for name in ("logprobs", "prompt_logprobs"):
        asked: int | None = getattr(params, name)
        if asked is None:
            continue
        num = vocab_size if asked == -1 else asked
        if num > limit:
            whole = f", the whole vocabulary of {vocab_size}," if asked == -1 else ""
            raise RequestError(
                f"{name}={asked}{whole} is outside [0, {limit}]; the server's operator raises that with --max-logprobs",
                param=name,
            )
        if asked == -1:
            changes[name] = num
    return params.with_(**changes) if changes else params


def resolve_max_tokens(num_prompt_tokens: int, max_tokens: int | None, max_model_len: int) -> int:
    """New tokens a request may have: what it asked for, or all that the context leaves.

    Raises `ContextLengthError` when prompt and `max_tokens` do not fit.
    """
    room = max_model_len - num_prompt_tokens
    if room < 1 or (max_tokens is not None and max_tokens > room):
        asked = "" if max_tokens is None else f" and max_tokens={max_tokens} asks for more than the {max(0, room)} left"
        raise ContextLengthError(
            f"This model's maximum context length is {max_model_len} tokens, the prompt has {num_prompt_tokens}"
            f"{asked}: shorten the prompt or lower max_tokens",
            param="prompt" if room < 1 else "max_tokens",
        )
    return room if max_tokens is None else max_tokens
