"""OPT: layer norms, learned positions with an offset of 2, biases everywhere, a plain feed-forward layer; opt-350m has
embeddings narrower than its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayllm.errors import ConfigError
from rayllm.models.config_fields import (
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    MAX_WIDTH,
    ConfigFields,
    read_activation,
    read_dtype,
    read_heads,
)
from rayllm.spec import DecoderSpec, GroupedAttentionSpec, LayerSpec, MlpSpec, NormSpec, PositionsSpec

MODEL_TYPES = ("opt",)
EXAMPLES = ("facebook/opt-125m", "facebook/opt-350m")
_NAMES = {
    "embedding": "model.decoder.embed_tokens",
    "project_in": "model.decoder.project_in",
    "project_out": "model.decoder.project_out",
    "positions": "model.decoder.embed_positions",
    "layers.attention_norm": "model.decoder.layers.{}.self_attn_layer_norm",
    "layers.q": "model.decoder.layers.{}.self_attn.q_proj",
    "layers.k": "model.decoder.layers.{}.self_attn.k_proj",
    "layers.v": "model.decoder.layers.{}.self_attn.v_proj",
    "layers.out": "model.decoder.layers.{}.self_attn.out_proj",
    "layers.mlp_norm": "model.decoder.layers.{}.final_layer_norm",
    "layers.up": "model.decoder.layers.{}.fc1",
    "layers.down": "model.decoder.layers.{}.fc2",
    "final_norm": "model.decoder.final_layer_norm",
    "lm_head": "lm_head",
}
_LAYER_NORM = NormSpec("layer", 1e-5)


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads OPT's config; norms without weights are refused."""
    fields = ConfigFields(hf_config)
    hidden_size = fields.integer("hidden_size", 1, MAX_WIDTH)
    if not fields.flag("layer_norm_elementwise_affine", True):
        raise ConfigError("layer_norm_elementwise_affine=False is not supported")
    num_heads, _, head_dim = read_heads(fields, hidden_size)
    if num_heads * head_dim != hidden_size:
        raise ConfigError(f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads}")
    bias = fields.flag("enable_bias", True)
    norm_first = fields.flag("do_layer_norm_before", True)
    max_positions = fields.integer("max_position_embeddings", 1, MAX_POSITIONS, default=2048)
    layer = LayerSpec(
        GroupedAttentionSpec(num_heads, num_heads, head_dim, scale=head_dim**-0.5, qkv_bias=bias, out_bias=bias),
        MlpSpec(
            fields.integer("ffn_dim", 1, MAX_WIDTH),
            read_activation(fields, "activation_function", default="relu"),
            gated=False,
            bias=bias,
        ),
        _LAYER_NORM,
        "input" if norm_first else "sum",
    )
    has_final_norm = norm_first and not fields.flag("_remove_final_layer_norm", False)
    return DecoderSpec(
        architecture="OPTForCausalLM",
        dtype=read_dtype(fields),
        vocab_size=fields.integer("vocab_size", 1, MAX_VOCAB),
        hidden_size=hidden_size,
        layers=(layer,) * fields.integer("num_hidden_layers", 1, MAX_LAYERS),
        final_norm=_LAYER_NORM if has_final_norm else None,
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        max_model_len=max_positions,
        embedding_size=fields.integer("word_embed_proj_dim", 1, MAX_WIDTH, default=hidden_size),
        positions=PositionsSpec(max_positions, offset=2),
    )


def names(spec: DecoderSpec) -> Mapping[str, str]:
    """The checkpoint's modules."""
    return _NAMES
