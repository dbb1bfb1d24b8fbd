"""Phi 3, 3.5 and 4: Llama with fused queries, keys and values, fused gate and up, and LongRoPE for long contexts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayllm.models.architectures import llama
from rayllm.models.config_fields import MAX_POSITIONS, ConfigFields
from rayllm.spec import DecoderSpec, GroupedAttentionSpec, MlpSpec
from rayllm.weights.stored import Stored, split_rows

MODEL_TYPES = ("phi3",)
EXAMPLES = ("microsoft/Phi-3.5-mini-instruct", "microsoft/Phi-4-mini-instruct")
_DEFAULTS = {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, "hidden_act": "silu"}


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads Phi 3's config; `sliding_window`, if given, is every layer's."""
    config = {**_DEFAULTS, **hf_config}
    fields = ConfigFields(config)
    window = None if fields.get("sliding_window") is None else fields.integer("sliding_window", 1, MAX_POSITIONS)
    base = llama.spec(config, default_positions=4096)
    layers = tuple(llama.with_attention(layer, window=window, qkv_bias=False, out_bias=False) for layer in base.layers)
    return replace(base, architecture="Phi3ForCausalLM", layers=layers)


def names(spec: DecoderSpec) -> Mapping[str, str | Stored]:
    """The checkpoint's modules."""
    attention, mlp = spec.layers[0].attention, spec.layers[0].feed_forward
    assert isinstance(attention, GroupedAttentionSpec)
    assert isinstance(mlp, MlpSpec)
    q_width, kv_width = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    q, k, v = split_rows("model.layers.{}.self_attn.qkv_proj", q_width, kv_width, kv_width)
    gate, up = split_rows("model.layers.{}.mlp.gate_up_proj", mlp.intermediate_size, mlp.intermediate_size)
    return {**llama.names(spec), "layers.q": q, "layers.k": k, "layers.v": v, "layers.gate": gate, "layers.up": up}
