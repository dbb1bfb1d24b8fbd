"""Qwen 3: Llama with a norm on each head of queries and keys, and a head width of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayllm.models.architectures import llama
from rayllm.models.architectures.qwen2 import layer_windows
from rayllm.spec import DecoderSpec

MODEL_TYPES = ("qwen3",)
EXAMPLES = ("Qwen/Qwen3-0.6B",)
names = llama.names


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads Qwen3's config."""
    base = llama.spec(hf_config, default_head_dim=128, default_positions=32768)
    layers = tuple(
        llama.with_attention(layer, qk_norm=layer.norm, window=window)
        for layer, window in zip(base.layers, layer_windows(hf_config, base.num_layers))
    )
    return replace(base, architecture="Qwen3ForCausalLM", layers=layers)
