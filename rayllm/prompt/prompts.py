"""What Python callers give as a prompt, to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from rayllm.errors import RequestError
from rayllm.prompt.text_model import TextModel
from rayllm.request import SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or vLLM's `{"prompt": text}` / `{"prompt_token_ids": ids}`."""
Message = Mapping[str, Any]
Conversation = Sequence[Message]


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    text: str | None
    token_ids: list[int]


def prepare_prompt(prompt: Prompt, model: TextModel, params: SamplingParams | None = None) -> PreparedPrompt:
    """Tokenizes text; takes ids as they are. Raises `RequestError` for anything else, and `ContextLengthError` for a
    text that cannot fit, unless `params` cut it."""
    if isinstance(prompt, Mapping):
        unknown = set(prompt) - {"prompt", "prompt_token_ids"}
        if unknown or not prompt:
            raise RequestError(
                f"a prompt mapping holds 'prompt' or 'prompt_token_ids', got {sorted(prompt)}", param="prompt"
            )
        if "prompt_token_ids" not in prompt:
            return prepare_prompt(prompt["prompt"], model, params)
        ids = prepare_prompt(prompt["prompt_token_ids"], model).token_ids
        return PreparedPrompt(prompt.get("prompt"), ids)
    if isinstance(prompt, str):
        if params is None or params.truncate_prompt_tokens is None:
            model.check_length(len(prompt), "prompt")
        return PreparedPrompt(prompt, model.tokenizer.encode(prompt))
    if not isinstance(prompt, Sequence):
        raise RequestError(f"a prompt is text or a list of token ids, got {prompt!r}", param="prompt")
    ids = list(cast(Sequence[int], prompt))
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise RequestError("a prompt is text or a list of token ids", param="prompt")
    return PreparedPrompt(None, ids)


def truncated(prompt: PreparedPrompt, params: SamplingParams, max_model_len: int) -> PreparedPrompt:
    """The prompt's last `truncate_prompt_tokens` tokens; -1: with room for one token more. Raises `RequestError` where
    these are more than the context holds."""
    limit = params.truncate_prompt_tokens
    if limit is None:
        return prompt
    if limit > max_model_len:
        raise RequestError(
            f"truncate_prompt_tokens={limit} is outside [1, {max_model_len}]", param="truncate_prompt_tokens"
        )
    num_kept = max(1, max_model_len - (params.max_tokens or 1)) if limit == -1 else limit
    return PreparedPrompt(prompt.text, prompt.token_ids[-num_kept:])
