"""Qwen 2 and 2.5: Llama with biases on queries, keys and values, and windows on the upper layers where asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayllm.models.architectures import llama
from rayllm.models.config_fields import MAX_LAYERS, MAX_POSITIONS, ConfigFields, read_layer_types
from rayllm.spec import DecoderSpec

MODEL_TYPES = ("qwen2",)
EXAMPLES = ("Qwen/Qwen2.5-7B-Instruct",)
names = llama.names


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads Qwen2's config."""
    base = llama.spec(hf_config, default_positions=32768)
    windows = layer_windows(hf_config, base.num_layers)
    layers = tuple(
        llama.with_attention(layer, qkv_bias=True, out_bias=False, window=window)
        for layer, window in zip(base.layers, windows)
    )
    return replace(base, architecture="Qwen2ForCausalLM", layers=layers)


def layer_windows(hf_config: Mapping[str, Any], num_layers: int) -> list[int | None]:
    """Each layer's window: by `layer_types` if given, else the layers from `max_window_layers` on have one."""
    fields = ConfigFields(hf_config)
    if not fields.flag("use_sliding_window", False) or (
        "sliding_window" in hf_config and fields.get("sliding_window") is None
    ):
        return [None] * num_layers
    window = fields.integer("sliding_window", 1, MAX_POSITIONS, default=4096)
    if fields.get("layer_types") is None:
        first = fields.integer("max_window_layers", 0, MAX_LAYERS, default=28)
        return [window if layer >= first else None for layer in range(num_layers)]
    return [window if kind == "sliding_attention" else None for kind in read_layer_types(fields, num_layers, ())]
