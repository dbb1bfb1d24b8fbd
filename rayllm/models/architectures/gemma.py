"""Gemma 1: Llama with zero-centered norms, scaled embeddings, tied weights and a width of heads of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayllm.errors import ConfigError
from rayllm.models.architectures import llama
from rayllm.spec import DecoderSpec

MODEL_TYPES = ("gemma",)
EXAMPLES = ("google/gemma-2b-it",)
names = llama.names
_DEFAULTS = {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"}


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads Gemma's config; "gelu" in the official ones means the approximation by tanh."""
    config = {**_DEFAULTS, **hf_config}
    if config["hidden_act"] == "gelu":
        config["hidden_act"] = _DEFAULTS["hidden_act"]
    return replace(from_llama(config), architecture="GemmaForCausalLM")


def from_llama(config: Mapping[str, Any]) -> DecoderSpec:
    """Reads what all versions of Gemma have in common."""
    if config.get("use_bidirectional_attention"):
        raise ConfigError("use_bidirectional_attention=True is not supported: attention must be causal")
    config = {"tie_word_embeddings": True, **config}
    base = llama.spec(config, default_head_dim=256, default_positions=8192)
    norm = replace(base.layers[0].norm, zero_centered=True)
    layers = tuple(replace(layer, norm=norm) for layer in base.layers)
    return replace(base, layers=layers, final_norm=norm, embedding_scale=base.hidden_size**0.5)
