"""Gemma 2: Gemma with norms on the outputs too, soft caps on scores and logits, and windows on every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayllm.models.architectures import gemma, llama
from rayllm.models.config_fields import MAX_POSITIONS, ConfigFields, read_layer_types
from rayllm.spec import DecoderSpec

MODEL_TYPES = ("gemma2",)
EXAMPLES = ("google/gemma-2-2b-it",)
_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads Gemma 2's config; a soft cap of null is none."""
    config = {**_DEFAULTS, **hf_config}
    return replace(from_gemma(config, window_period=2), architecture="Gemma2ForCausalLM")


def from_gemma(config: Mapping[str, Any], window_period: int) -> DecoderSpec:
    """Reads what Gemma 2 and 3 have in common. Without `layer_types` all layers but each `window_period`-th have a
    window."""
    fields = ConfigFields(config)
    base = gemma.from_llama({**config, "hidden_act": fields.get("hidden_activation")})
    score_cap, logits_cap = (
        None if fields.get(name) is None else fields.number(name, 1e-3, 1e6)
        for name in ("attn_logit_softcapping", "final_logit_softcapping")
    )
    default = [("full" if index % window_period == 0 else "sliding") for index in range(1, base.num_layers + 1)]
    layer_types = read_layer_types(fields, base.num_layers, [f"{kind}_attention" for kind in default])
    scale = fields.number("query_pre_attn_scalar", 1e-6, 1e6) ** -0.5
    layers = []
    for layer, layer_type in zip(base.layers, layer_types):
        window = fields.integer("sliding_window", 1, MAX_POSITIONS) if layer_type == "sliding_attention" else None
        layer = llama.with_attention(layer, scale=scale, soft_cap=score_cap, window=window)
        layers.append(replace(layer, norm_placement="input_and_output"))
    return replace(base, layers=tuple(layers), logits_soft_cap=logits_cap)


def names(spec: DecoderSpec) -> Mapping[str, str]:
    """The checkpoint's modules; what Llama calls the norm after attention stands on attention's output here."""
    return {
        **llama.names(spec),
        "layers.attention_output_norm": "model.layers.{}.post_attention_layernorm",
        "layers.mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
        "layers.mlp_output_norm": "model.layers.{}.post_feedforward_layernorm",
    }
