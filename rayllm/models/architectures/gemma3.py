"""Gemma 3, text alone: Gemma 2 with norms on queries and keys in place of soft caps, and one rotary embedding for
layers with a window, another for those without. Its models that see images keep the text part under another prefix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayllm.errors import ConfigError
from rayllm.models.architectures import gemma2, llama
from rayllm.models.config_fields import LAYER_TYPES, MAX_LAYERS, ConfigFields, read_rope, text_config
from rayllm.spec import DecoderSpec, GroupedAttentionSpec
from rayllm.weights.stored import FirstOf, Stored, Tensor

MODEL_TYPES = ("gemma3_text", "gemma3")
EXAMPLES = ("google/gemma-3-1b-it", "google/gemma-3-4b-it")
LEFT_OUT = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta")
"""Read here, not by Llama's reader."""


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads Gemma 3's config, or its `text_config`. `max_position_embeddings` is the context with rope scaling."""
    config = {**_DEFAULTS, **text_config(hf_config)}
    fields = ConfigFields(config)
    if fields.get("attn_logit_softcapping") is not None:
        raise ConfigError("attn_logit_softcapping must be null: Gemma 3 has no soft cap on scores")
    plain = {name: value for name, value in config.items() if name not in _ROPE_FIELDS}
    base = gemma2.from_gemma(plain, fields.integer("sliding_window_pattern", 1, MAX_LAYERS, 6))
    attention, max_positions = base.layers[0].attention, base.max_model_len
    assert isinstance(attention, GroupedAttentionSpec)
    sections = fields.section("rope_parameters")
    if sections is None:
        sections = ConfigFields({"rope_scaling": fields.get("rope_scaling")})
    elif all(sections.get(layer_type) is None for layer_type in LAYER_TYPES):
        raise ConfigError(f"rope_parameters must be an object with {' and '.join(LAYER_TYPES)}")
    theta = fields.number("rope_theta", 1.0, 1e12, 1_000_000.0)
    full = read_rope(sections, attention.head_dim, max_positions, theta, ("full_attention", "rope_scaling"))
    theta = fields.number("rope_local_base_freq", 1.0, 1e12, 10_000.0)
    sliding = read_rope(sections, attention.head_dim, max_positions, theta, ("sliding_attention",))
    layers = tuple(
        llama.with_attention(layer, qk_norm=layer.norm, rope=full if layer.attention.window is None else sliding)
        for layer in base.layers
    )
    name = "Gemma3ForCausalLM" if "text_config" not in hf_config else "Gemma3ForConditionalGeneration"
    return replace(base, architecture=name, layers=layers)


def names(spec: DecoderSpec) -> Mapping[str, str | Stored]:
    """The checkpoint's modules: Gemma 2's, under one of two prefixes in a model that sees images."""
    plain = gemma2.names(spec)
    if spec.architecture == "Gemma3ForCausalLM":
        return plain
    return {
        module: FirstOf((Tensor(f"language_model.{name}"), Tensor(name.replace("model.", "model.language_model.", 1))))
        for module, name in plain.items()
    }
