"""Qwen1.5-MoE and Qwen2-MoE: Qwen 2 with a mixture of experts and a gated shared expert in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayllm.models.architectures import llama, qwen2
from rayllm.models.config_fields import MAX_LAYERS, MAX_WIDTH, ConfigFields, read_activation
from rayllm.models.sparse_fields import expert_names, read_num_experts, sparse_by_step, with_sparse_layers
from rayllm.spec import DecoderSpec, ExpertSpec, MlpSpec, RouterSpec, SparseMlpSpec
from rayllm.weights.stored import Stored

MODEL_TYPES = ("qwen2_moe",)
EXAMPLES = ("Qwen/Qwen1.5-MoE-A2.7B-Chat",)
_DEFAULTS = {"hidden_act": "silu", "moe_intermediate_size": 1408, "num_experts_per_tok": 4}
_MLP = "model.layers.{}.mlp"


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads Qwen2-MoE's config."""
    config = {**_DEFAULTS, **hf_config}
    fields = ConfigFields(config)
    base = qwen2.spec({**config, "layer_types": _layer_types(fields)})
    bias = fields.flag("qkv_bias", True)
    base = replace(base, layers=tuple(llama.with_attention(layer, qkv_bias=bias) for layer in base.layers))
    shared_size = fields.integer("shared_expert_intermediate_size", 1, MAX_WIDTH, default=5632)
    shared = MlpSpec(shared_size, read_activation(fields, "hidden_act"), gated=True)
    return with_experts(base, config, "Qwen2MoeForCausalLM", 60, shared)


def with_experts(
    base: DecoderSpec,
    config: Mapping[str, Any],
    architecture: str,
    default_experts: int,
    shared: MlpSpec | None = None,
) -> DecoderSpec:
    """`base` with experts in the layers that the config names, and the gated layer `shared` beside them, if given."""
    fields = ConfigFields(config)
    num_experts, top_k = read_num_experts(fields, default_experts)
    sparse = SparseMlpSpec(
        RouterSpec(num_experts, top_k, "softmax", renormalize=fields.flag("norm_topk_prob", False)),
        ExpertSpec(fields.integer("moe_intermediate_size", 1, MAX_WIDTH), read_activation(fields, "hidden_act")),
        shared,
        shared_gate=shared is not None,
    )
    mixed = with_sparse_layers(base, sparse, sparse_by_step(fields, base.num_layers))
    return replace(mixed, architecture=architecture)


def names(spec: DecoderSpec) -> Mapping[str, str | Stored]:
    """The checkpoint's modules."""
    shared = {f"layers.shared.{part}": f"{_MLP}.shared_expert.{part}_proj" for part in ("gate", "up", "down")}
    router = {"layers.router": f"{_MLP}.gate", "layers.shared_gate": f"{_MLP}.shared_expert_gate"}
    return {**llama.names(spec), **expert_names(f"{_MLP}.experts"), **shared, **router}


def _layer_types(fields: ConfigFields) -> Any:
    """Those of config.json, else every second one of the first `max_window_layers` layers has a window, if any has."""
    if fields.get("layer_types") is not None:
        return fields.get("layer_types")
    first_without = fields.integer("max_window_layers", 0, MAX_LAYERS, default=28)
    num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    return [
        "sliding_attention" if layer % 2 == 0 and layer < first_without else "full_attention"
        for layer in range(num_layers)
    ]
