"""Sampling defaults of requests, as a model's generation_config.json and the operator set them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rayllm.config.base import BaseConfig
from rayllm.errors import did_you_mean

GENERATION_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
"""What of a generation_config.json is a default of requests: the fields that vLLM takes."""


def json_object_text(value: Any, example: str) -> str:
    """An object, or its JSON text, as JSON text: a frozen config holds nothing that changes."""
    reason = f"give a JSON object, as {example}"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(reason) from None
    if not isinstance(value, Mapping):
        raise ValueError(reason)
    try:
        return json.dumps(dict(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{reason} ({error})") from None


def generation_fields_text(value: Any) -> str:
    """An object of generation fields, or its JSON text, as JSON text."""
    text = json_object_text(value, '{"temperature": 0.5}')
    for name in json.loads(text):
        if name not in GENERATION_FIELDS:
            near = did_you_mean(name, GENERATION_FIELDS)
            raise ValueError(f"unknown field {name[:100]!r}{near}; known are {', '.join(GENERATION_FIELDS)}")
    return text


class GenerationDefaults(BaseConfig):
    """Sampling defaults of requests; None: the API's own. Made by `engine.generation_config`."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    max_tokens_limit: int | None = None
    """The most that a request gets, whatever it asks for."""
    source: str = ""

    def sampling_fields(self) -> dict[str, Any]:
        """Those that are set, by the names of `SamplingParams`; without `max_tokens`."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def described(self) -> str:
        """In one line; empty where nothing is set."""
        fields = {**self.sampling_fields(), "max_tokens": self.max_tokens}
        shown = ", ".join(f"{name} {value:g}" for name, value in fields.items() if value is not None)
        return f"{shown} ({self.source})" if shown else ""
