"""GLM-4.5 to 4.7: Llama with biases on queries, keys and values, half of each head rotated, and after the first layers
a mixture of experts with shared ones. The module that predicts further tokens (the layer after the last) is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayllm.models.architectures import llama
from rayllm.models.config_fields import ConfigFields
from rayllm.models.sparse_fields import read_grouped_router, shared_expert_names, with_shared_experts
from rayllm.spec import DecoderSpec
from rayllm.weights.stored import Stored

MODEL_TYPES = ("glm4_moe",)
EXAMPLES = ("zai-org/GLM-4.5-Air",)
LEFT_OUT = ("model.layers.{}.",)
_DEFAULTS = {
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "moe_intermediate_size": 1408,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
}


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads GLM-4-MoE's config."""
    config = {**_DEFAULTS, **hf_config}
    fields = ConfigFields(config)
    base = llama.spec(config, default_positions=131072)
    qk_norm = base.layers[0].norm if fields.flag("use_qk_norm", False) else None
    layers = tuple(llama.with_attention(layer, qk_norm=qk_norm, out_bias=False) for layer in base.layers)
    router = read_grouped_router(
        fields,
        default_experts=128,
        scoring="sigmoid",
        renormalize=fields.flag("norm_topk_prob", True),
        group_score="top2_sum",
        has_choice_bias=True,
        float32=True,
    )
    mixed = with_shared_experts(replace(base, layers=layers), fields, router)
    return replace(mixed, architecture="Glm4MoeForCausalLM")


def names(spec: DecoderSpec) -> Mapping[str, str | Stored]:
    """The checkpoint's modules."""
    return {**llama.names(spec), **shared_expert_names("model.layers.{}.mlp")}
