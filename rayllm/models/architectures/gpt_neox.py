"""GPT-NeoX and Pythia: attention and feed-forward in parallel, queries, keys and values of each head fused."""

from __future__ import annotations

from collections.abc import Mapping
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
from rayllm.weights.stored import Stored, interleaved_rows

MODEL_TYPES = ("gpt_neox",)
EXAMPLES = ("EleutherAI/pythia-160m", "EleutherAI/gpt-neox-20b")
_LAYER = "gpt_neox.layers.{}"
_NAMES = {
    "embedding": "gpt_neox.embed_in",
    "layers.attention_norm": f"{_LAYER}.input_layernorm",
    "layers.out": f"{_LAYER}.attention.dense",
    "layers.mlp_norm": f"{_LAYER}.post_attention_layernorm",
    "layers.up": f"{_LAYER}.mlp.dense_h_to_4h",
    "layers.down": f"{_LAYER}.mlp.dense_4h_to_h",
    "final_norm": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
}


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads GPT-NeoX's config, which has names of its own for the base and the share of the rotation."""
    fields = ConfigFields(hf_config)
    hidden_size = fields.integer("hidden_size", 1, MAX_WIDTH)
    num_heads, _, head_dim = read_heads(fields, hidden_size)
    max_positions = fields.integer("max_position_embeddings", 1, MAX_POSITIONS, default=2048)
    rotation = {
        "rope_theta": fields.number("rotary_emb_base", 1.0, 1e12, default=10_000.0),
        "partial_rotary_factor": fields.number("rotary_pct", 0.0, 1.0, default=0.25),
    }
    rope = read_rope(ConfigFields({**hf_config, **rotation}), head_dim, max_positions)
    bias = fields.flag("attention_bias", True)
    norm = NormSpec("layer", fields.number("layer_norm_eps", 0, 1, default=1e-5))
    layer = LayerSpec(
        GroupedAttentionSpec(num_heads, num_heads, head_dim, head_dim**-0.5, qkv_bias=bias, out_bias=bias, rope=rope),
        MlpSpec(
            fields.integer("intermediate_size", 1, MAX_WIDTH),
            read_activation(fields, "hidden_act", default="gelu"),
            gated=False,
            bias=True,
        ),
        norm,
        parallel=fields.flag("use_parallel_residual", True),
    )
    return DecoderSpec(
        architecture="GPTNeoXForCausalLM",
        dtype=read_dtype(fields),
        vocab_size=fields.integer("vocab_size", 1, MAX_VOCAB),
        hidden_size=hidden_size,
        layers=(layer,) * fields.integer("num_hidden_layers", 1, MAX_LAYERS),
        final_norm=norm,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        max_model_len=scaled_context(rope, max_positions),
    )


def names(spec: DecoderSpec) -> Mapping[str, str | Stored]:
    """The checkpoint's modules."""
    attention = spec.layers[0].attention
    assert isinstance(attention, GroupedAttentionSpec)
    parts = interleaved_rows(f"{_LAYER}.attention.query_key_value", attention.num_heads, *[attention.head_dim] * 3)
    return {**_NAMES, **{f"layers.{name}": rows for name, rows in zip("qkv", parts, strict=True)}}
