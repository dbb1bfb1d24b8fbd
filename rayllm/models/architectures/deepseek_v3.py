"""DeepSeek-V3 and R1, Moonlight, Kimi-K2: DeepSeek-V2 with another router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayllm.models.architectures import deepseek_v2
from rayllm.models.config_fields import ConfigFields
from rayllm.models.sparse_fields import read_grouped_router, with_shared_experts
from rayllm.spec import DecoderSpec

MODEL_TYPES = ("deepseek_v3", "kimi_k2")
EXAMPLES = ("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1", "moonshotai/Moonlight-16B-A3B-Instruct")
LEFT_OUT = ("model.layers.{}.",)
"""The layer that predicts further tokens."""
_DEFAULTS = {
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
}
names = deepseek_v2.names


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads DeepSeek-V3's config."""
    config = {**_DEFAULTS, **hf_config, "mlp_bias": False}
    fields = ConfigFields(config)
    fields.choice("scoring_func", {"sigmoid": "sigmoid"}, default="sigmoid")
    fields.choice("topk_method", {"noaux_tc": "noaux_tc"}, default="noaux_tc")
    router = read_grouped_router(
        fields,
        256,
        scoring="sigmoid",
        renormalize=fields.flag("norm_topk_prob", True),
        group_score="top2_sum",
        has_choice_bias=True,
        float32=True,
    )
    in_pairs = fields.flag("rope_interleave", True)
    base = deepseek_v2.with_latent_attention(config, default_positions=4096, in_pairs=in_pairs)
    return replace(with_shared_experts(base, fields, router), architecture="DeepseekV3ForCausalLM")
