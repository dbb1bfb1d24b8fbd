"""Qwen3-MoE: Qwen 3 with a mixture of experts in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayllm.models.architectures import qwen2_moe, qwen3
from rayllm.models.config_fields import MAX_LAYERS, ConfigFields
from rayllm.spec import DecoderSpec

MODEL_TYPES = ("qwen3_moe",)
EXAMPLES = ("Qwen/Qwen3-30B-A3B",)
_DEFAULTS = {"hidden_act": "silu", "moe_intermediate_size": 768, "num_experts_per_tok": 8}
names = qwen2_moe.names


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads Qwen3-MoE's config; a window, where `use_sliding_window` asks for one, is on every layer."""
    config = {**_DEFAULTS, **hf_config}
    num_layers = ConfigFields(config).integer("num_hidden_layers", 1, MAX_LAYERS)
    base = qwen3.spec({**config, "layer_types": ["sliding_attention"] * num_layers})
    return qwen2_moe.with_experts(base, config, "Qwen3MoeForCausalLM", default_experts=128)
