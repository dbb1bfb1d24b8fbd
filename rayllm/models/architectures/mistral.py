"""Mistral: Llama with a sliding window on every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayllm.models.architectures import llama
from rayllm.models.config_fields import MAX_POSITIONS, ConfigFields
from rayllm.spec import DecoderSpec

MODEL_TYPES = ("mistral",)
EXAMPLES = ("mistralai/Mistral-7B-Instruct-v0.3",)
names = llama.names


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads Mistral's config; `sliding_window` null is none, absent is 4096 (the config class's default)."""
    fields = ConfigFields(hf_config)
    base = llama.spec(hf_config, default_positions=4096 * 32)
    window: int | None = None
    if fields.get("sliding_window") is not None or "sliding_window" not in hf_config:
        window = fields.integer("sliding_window", 1, MAX_POSITIONS, default=4096)
    layers = tuple(llama.with_attention(layer, window=window, qkv_bias=False, out_bias=False) for layer in base.layers)
    return replace(base, architecture="MistralForCausalLM", layers=layers)
