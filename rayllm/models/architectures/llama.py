"""Llama 1 to 3 and models of the same shape: RMS norm first, rotary positions, grouped heads, gated feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayllm.models.config_fields import (
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    MAX_WIDTH,
    ConfigFields,
    read_activation,
    read_dtype,
    read_heads,
    read_rope,
    scaled_context,
)
from rayllm.spec import DecoderSpec, GroupedAttentionSpec, LayerSpec, MlpSpec, NormSpec

MODEL_TYPES = ("llama",)
EXAMPLES = ("meta-llama/Llama-3.1-8B-Instruct", "lmsys/vicuna-7b-v1.5")
_NAMES = {
    "embedding": "model.embed_tokens",
    "layers.attention_norm": "model.layers.{}.input_layernorm",
    "layers.q": "model.layers.{}.self_attn.q_proj",
    "layers.k": "model.layers.{}.self_attn.k_proj",
    "layers.v": "model.layers.{}.self_attn.v_proj",
    "layers.q_norm": "model.layers.{}.self_attn.q_norm",
    "layers.k_norm": "model.layers.{}.self_attn.k_norm",
    "layers.out": "model.layers.{}.self_attn.o_proj",
    "layers.mlp_norm": "model.layers.{}.post_attention_layernorm",
    "layers.gate": "model.layers.{}.mlp.gate_proj",
    "layers.up": "model.layers.{}.mlp.up_proj",
    "layers.down": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
}


def spec(
    hf_config: Mapping[str, Any], *, default_head_dim: int | None = None, default_positions: int = 2048
) -> DecoderSpec:
    """Reads Llama's config; architectures that differ by a field start from what this returns."""
    fields = ConfigFields(hf_config)
    hidden_size = fields.integer("hidden_size", 1, MAX_WIDTH)
    max_positions = fields.integer("max_position_embeddings", 1, MAX_POSITIONS, default_positions)
    num_heads, num_kv_heads, head_dim = read_heads(fields, hidden_size, default_head_dim)
    norm = NormSpec("rms", fields.number("rms_norm_eps", 0, 1, default=1e-6))
    attention_bias = fields.flag("attention_bias", False)
    rope = read_rope(fields, head_dim, max_positions)
    attention = GroupedAttentionSpec(
        num_heads,
        num_kv_heads,
        head_dim,
        scale=head_dim**-0.5,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        rope=rope,
    )
    mlp = MlpSpec(
        fields.integer("intermediate_size", 1, MAX_WIDTH),
        read_activation(fields, "hidden_act"),
        gated=True,
        bias=fields.flag("mlp_bias", False),
    )
    num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    return DecoderSpec(
        architecture="LlamaForCausalLM",
        dtype=read_dtype(fields),
        vocab_size=fields.integer("vocab_size", 1, MAX_VOCAB),
        hidden_size=hidden_size,
        layers=(LayerSpec(attention, mlp, norm),) * num_layers,
        final_norm=norm,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        max_model_len=scaled_context(rope, max_positions),
    )


def with_attention(layer: LayerSpec, **changes: Any) -> LayerSpec:
    """`layer` with some fields of its attention changed."""
    return replace(layer, attention=replace(layer.attention, **changes))


def names(spec: DecoderSpec) -> Mapping[str, str]:
    """The checkpoint's modules."""
    return _NAMES
