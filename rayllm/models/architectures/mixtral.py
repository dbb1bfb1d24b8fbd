"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayllm.models.architectures import llama, mistral
from rayllm.models.config_fields import MAX_WIDTH, ConfigFields, read_activation
from rayllm.models.sparse_fields import expert_names, read_num_experts, with_sparse_layers
from rayllm.spec import DecoderSpec, ExpertSpec, RouterSpec, SparseMlpSpec
from rayllm.weights.stored import Stored

MODEL_TYPES = ("mixtral",)
EXAMPLES = ("mistralai/Mixtral-8x7B-Instruct-v0.1",)
_DEFAULTS = {
    "hidden_act": "silu",
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
}
"""What the config class has where config.json says nothing, and Mistral has not."""


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads Mixtral's config."""
    config = {**_DEFAULTS, **hf_config}
    fields = ConfigFields(config)
    base = mistral.spec(config)
    num_experts, top_k = read_num_experts(fields, default=8)
    sparse = SparseMlpSpec(
        RouterSpec(num_experts, top_k, "softmax", renormalize=True),
        ExpertSpec(fields.integer("intermediate_size", 1, MAX_WIDTH), read_activation(fields, "hidden_act")),
    )
    return replace(with_sparse_layers(base, sparse, [True] * base.num_layers), architecture="MixtralForCausalLM")


def names(spec: DecoderSpec) -> Mapping[str, str | Stored]:
    """The checkpoint's modules."""
    block = "model.layers.{}.block_sparse_moe"
    experts = expert_names(f"{block}.experts", gate="w1", up="w3", down="w2")
    return {**llama.names(spec), **experts, "layers.router": f"{block}.gate"}
