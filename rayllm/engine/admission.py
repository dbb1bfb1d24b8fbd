"""What a driver checks of a request before it queues it: the last line, for callers that did not check."""

from __future__ import annotations

from rayllm.config import ResolvedConfig
from rayllm.errors import ContextLengthError, RequestError
from rayllm.request import Request


def check_request(request: Request, config: ResolvedConfig) -> None:
    """Raises `RequestError` when the request's ids or lengths do not fit the model."""
    prompt, vocab_size = request.prompt_token_ids, config.shape.vocab_size
    if not prompt:
        raise RequestError("the prompt is empty: give at least one token", param="prompt")
    for token_id in (min(prompt), max(prompt)):
        if not 0 <= token_id < vocab_size:
            raise RequestError(f"prompt token id {token_id} is outside the vocabulary of {vocab_size}", param="prompt")
    params = request.params
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        for token_id in getattr(params, name) or ():
            if token_id >= vocab_size:
                raise RequestError(f"{name} holds {token_id}, outside the vocabulary of {vocab_size}", param=name)
    num_tokens = len(prompt) + request.max_tokens
    if request.max_tokens < 1 or num_tokens > config.max_model_len:
        raise ContextLengthError(
            f"This model's maximum context length is {config.max_model_len} tokens: the prompt has {len(prompt)} and "
            f"max_tokens is {request.max_tokens}, {num_tokens} in all; shorten the prompt or lower max_tokens",
            param="max_tokens",
        )
    if params.min_tokens > request.max_tokens:
        raise RequestError(
            f"min_tokens={params.min_tokens} is more than max_tokens={request.max_tokens}", param="min_tokens"
        )


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
