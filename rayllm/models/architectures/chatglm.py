"""ChatGLM2, ChatGLM3 and GLM-4 as first published: Llama's block with neighbouring channels of half of each head
turned, few key/value heads, and queries, keys and values as well as gate and up fused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayllm.errors import ConfigError
from rayllm.models.config_fields import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    MAX_WIDTH,
    ConfigFields,
    read_dtype,
)
from rayllm.spec import DecoderSpec, GroupedAttentionSpec, LayerSpec, MlpSpec, NormSpec, RopeSpec
from rayllm.weights.stored import Stored, split_rows

MODEL_TYPES = ("chatglm",)
EXAMPLES = ("zai-org/glm-4-9b-chat", "zai-org/chatglm3-6b", "zai-org/chatglm2-6b")
_LAYER = "transformer.encoder.layers.{}"
_UNSUPPORTED = {
    "apply_residual_connection_post_layernorm": "the residual after the norm is not supported",
    "interleaved_qkv": "rows of queries, keys and values by head are not supported",
    "fp32_residual_connection": "residuals in float32 are not supported",
    "position_encoding_2d": "ChatGLM-6B, the first of the family, is another model: use chatglm2-6b or later",
    "pre_seq_len": "tuned prefixes are not supported: use the checkpoint without them",
    "quantization_bit": "its quantized weights are not supported: use the checkpoint that is not quantized",
    "vision_config": "the model with images is not supported: use the one for text",
}
"""Fields that ask for other code, where they are neither absent, null, false nor 0."""


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads ChatGLM's config."""
    fields = ConfigFields(hf_config)
    for name, reason in _UNSUPPORTED.items():
        if fields.get(name):
            raise ConfigError(f"{name}={str(fields.get(name))[:40]}: {reason}")
    if not fields.flag("multi_query_attention", False):
        raise ConfigError("multi_query_attention=False is not supported: published models set it true")
    num_heads = fields.integer("num_attention_heads", 1, MAX_HEADS, default=32)
    num_kv_heads = fields.integer("multi_query_group_num", 1, MAX_HEADS, default=1)
    if num_heads % num_kv_heads:
        raise ConfigError(f"num_attention_heads={num_heads} is not a multiple of multi_query_group_num={num_kv_heads}")
    head_dim = fields.integer("kv_channels", 4, MAX_WIDTH, default=128)
    if head_dim % 4:
        raise ConfigError(f"kv_channels={head_dim} must be a multiple of 4: pairs of channels turn in half of them")
    ratio = fields.number("rope_ratio", 1e-3, 1e6, default=1.0)
    bias = fields.flag("add_bias_linear", False)
    norm = NormSpec(
        "rms" if fields.flag("rmsnorm", True) else "layer", fields.number("layernorm_epsilon", 0, 1, default=1e-5)
    )
    attention = GroupedAttentionSpec(
        num_heads,
        num_kv_heads,
        head_dim,
        scale=head_dim**-0.5,
        qkv_bias=bias or fields.flag("add_qkv_bias", False),
        out_bias=bias,
        rope=RopeSpec(10_000.0 * ratio, head_dim // 2, in_pairs=fields.flag("original_rope", True)),
    )
    mlp = MlpSpec(fields.integer("ffn_hidden_size", 1, MAX_WIDTH, default=13_696), "silu", gated=True, bias=bias)
    return DecoderSpec(
        architecture="ChatGLMModel",
        dtype=read_dtype(fields),
        vocab_size=fields.integer("padded_vocab_size", 1, MAX_VOCAB, default=65_024),
        hidden_size=fields.integer("hidden_size", 1, MAX_WIDTH, default=4096),
        layers=(LayerSpec(attention, mlp, norm),) * fields.integer("num_layers", 1, MAX_LAYERS, default=28),
        final_norm=norm if fields.flag("post_layer_norm", True) else None,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        max_model_len=fields.integer("seq_length", 1, MAX_POSITIONS, default=2048),
    )


def names(spec: DecoderSpec) -> Mapping[str, str | Stored]:
    """The checkpoint's modules. Rows of all queries stand before those of all keys, gate before up."""
    attention, mlp = spec.layers[0].attention, spec.layers[0].feed_forward
    assert isinstance(attention, GroupedAttentionSpec)
    assert isinstance(mlp, MlpSpec)
    heads = (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)
    fused = split_rows(f"{_LAYER}.self_attention.query_key_value", *(each * attention.head_dim for each in heads))
    gate, up = split_rows(f"{_LAYER}.mlp.dense_h_to_4h", mlp.intermediate_size, mlp.intermediate_size)
    return {
        "embedding": "transformer.embedding.word_embeddings",
        "layers.attention_norm": f"{_LAYER}.input_layernorm",
        **dict(zip(("layers.q", "layers.k", "layers.v"), fused, strict=True)),
        "layers.out": f"{_LAYER}.self_attention.dense",
        "layers.mlp_norm": f"{_LAYER}.post_attention_layernorm",
        "layers.gate": gate,
        "layers.up": up,
        "layers.down": f"{_LAYER}.mlp.dense_4h_to_h",
        "final_norm": "transformer.encoder.final_layernorm",
        "lm_head": "transformer.output_layer",
    }
