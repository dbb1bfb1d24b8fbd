"""Prompts in the forms that vLLM takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

TokenIds = Sequence[int]


class TextPrompt(TypedDict):
    """A prompt as text, in vLLM's form."""

    prompt: str


class _PromptText(TypedDict, total=False):
    prompt: str


class TokensPrompt(_PromptText):
    """A prompt as token ids, in vLLM's form; `prompt` is the text that they came from, where it is known."""

    prompt_token_ids: list[int]
