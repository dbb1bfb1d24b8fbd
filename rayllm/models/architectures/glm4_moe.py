"""GLM-4.5 to 4.7: Llama with biases on queries, keys and values, half of each head rotated, and after the first layers
a mixture of experts with shared ones. The module that predicts further tokens (the layer after the last) is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rayllm.models.architectures import llama
from rayllm.models.config_fields import MAX_WIDTH, ConfigFields, read_activation
from rayllm.models.sparse_fields import (
    MAX_EXPERTS,
    expert_names,
    read_grouped_router,
    sparse_after_dense,
    with_sparse_layers,
)
from rayllm.spec import DecoderSpec, ExpertSpec, MlpSpec, SparseMlpSpec

if TYPE_CHECKING:
    from rayllm.weights.stored import Stored

MODEL_TYPES = ("glm4_moe",)
EXAMPLES = ("zai-org/GLM-4.5-Air",)
LEFT_OUT = ("model.layers.{}.",)
_DEFAULTS = {
    "hidden_act": "silu",
    "num_experts_per_tok": 8,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
}
_MLP = "model.layers.{}.mlp"


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
    width = fields.integer("moe_intermediate_size", 1, MAX_WIDTH, default=1408)
    activation = read_activation(fields, "hidden_act")
    num_shared = fields.integer("n_shared_experts", 1, MAX_EXPERTS, default=1)
    shared = MlpSpec(width * num_shared, activation, gated=True)
    sparse = SparseMlpSpec(router, ExpertSpec(width, activation), shared)
    is_sparse = sparse_after_dense(fields, base.num_layers, default=1)
    mixed = with_sparse_layers(replace(base, layers=layers), sparse, is_sparse)
    return replace(mixed, architecture="Glm4MoeForCausalLM")


def names(spec: DecoderSpec) -> Mapping[str, str | Stored]:
    """The checkpoint's modules."""
    shared = {f"layers.shared.{part}": f"{_MLP}.shared_experts.{part}_proj" for part in ("gate", "up", "down")}
    router = {
        "layers.router": f"{_MLP}.gate",
        "layers.router.choice_bias": f"{_MLP}.gate.e_score_correction_bias",
    }
    return {**llama.names(spec), **expert_names(f"{_MLP}.experts"), **shared, **router}
