"""Reading what config.json says of a mixture of experts: its router, which layers are sparse, and names of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rayllm.errors import ConfigError
from rayllm.models.config_fields import MAX_LAYERS, MAX_WIDTH, ConfigFields, read_activation
from rayllm.spec import DecoderSpec, ExpertSpec, MlpSpec, RouterSpec, SparseMlpSpec
from rayllm.weights.stored import Stack, Stored, Tensor

MAX_EXPERTS = 2**16
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def read_num_experts(fields: ConfigFields, default: int | None = None) -> tuple[int, int]:
    """(experts of a layer, experts that a token takes). The first goes by several names: transformers 5 writes another
    one than the config has that it read."""
    name = next((name for name in _NUM_EXPERTS if fields.get(name) is not None), _NUM_EXPERTS[0])
    num_experts = fields.integer(name, 1, MAX_EXPERTS, default)
    return num_experts, fields.integer("num_experts_per_tok", 1, num_experts)


def read_grouped_router(fields: ConfigFields, default_experts: int | None = None, **router: Any) -> RouterSpec:
    """A router of the DeepSeek family, with groups and a scale; `router` are the fields of `RouterSpec` that
    config.json does not hold."""
    num_experts, top_k = read_num_experts(fields, default_experts)
    num_groups = fields.integer("n_group", 1, num_experts, default=1)
    top_groups = fields.integer("topk_group", 1, num_groups, default=1)
    if num_experts % num_groups:
        raise ConfigError(f"n_routed_experts={num_experts} is not a multiple of n_group={num_groups}")
    in_groups = top_groups * num_experts // num_groups
    if top_k > in_groups:
        raise ConfigError(
            f"num_experts_per_tok={top_k} is more than the {in_groups} experts of topk_group={top_groups} groups"
        )
    if num_groups == num_experts > 1 and router.get("group_score") == "top2_sum":
        raise ConfigError(f"n_group={num_groups} leaves one expert in each group; its score is the sum of two")
    scale = fields.number("routed_scaling_factor", 0, 1e6, default=1.0)
    return RouterSpec(num_experts, top_k, scale=scale, num_groups=num_groups, top_groups=top_groups, **router)


def sparse_by_step(fields: ConfigFields, num_layers: int) -> list[bool]:
    """Every `decoder_sparse_step`-th layer that is not among `mlp_only_layers`."""
    step = fields.integer("decoder_sparse_step", 1, MAX_LAYERS, default=1)
    dense = fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(layer) is not int or not 0 <= layer < num_layers for layer in dense):
        raise ConfigError(
            f"mlp_only_layers={str(dense)[:60]} must be a list of numbers of layers, 0 to {num_layers - 1}"
        )
    return [(layer + 1) % step == 0 and layer not in dense for layer in range(num_layers)]


def sparse_after_dense(fields: ConfigFields, num_layers: int) -> list[bool]:
    """All layers but the first `first_k_dense_replace`."""
    num_dense = fields.integer("first_k_dense_replace", 0, MAX_LAYERS, default=0)
    return [layer >= num_dense for layer in range(num_layers)]


def with_sparse_layers(base: DecoderSpec, sparse: SparseMlpSpec, is_sparse: Sequence[bool]) -> DecoderSpec:
    """`base` with a mixture of experts in some of its layers."""
    layers = tuple(
        replace(layer, feed_forward=sparse) if mixed else layer
        for layer, mixed in zip(base.layers, is_sparse, strict=True)
    )
    return replace(base, layers=layers)


def with_shared_experts(base: DecoderSpec, fields: ConfigFields, router: RouterSpec) -> DecoderSpec:
    """`base` with a mixture of experts `moe_intermediate_size` wide, beside `n_shared_experts` that every token takes,
    in all layers but the first `first_k_dense_replace`."""
    width = fields.integer("moe_intermediate_size", 1, MAX_WIDTH)
    activation = read_activation(fields, "hidden_act")
    num_shared = fields.integer("n_shared_experts", 1, MAX_EXPERTS)
    shared = MlpSpec(width * num_shared, activation, gated=True, bias=fields.flag("mlp_bias", False))
    sparse = SparseMlpSpec(router, ExpertSpec(width, activation), shared)
    return with_sparse_layers(base, sparse, sparse_after_dense(fields, base.num_layers))


def shared_expert_names(mlp: str) -> dict[str, str | Stored]:
    """Where the parameters of `with_shared_experts` stand, in the module `mlp` of a layer."""
    return {
        **expert_names(f"{mlp}.experts"),
        **{f"layers.shared.{part}": f"{mlp}.shared_experts.{part}_proj" for part in ("gate", "up", "down")},
        "layers.router": f"{mlp}.gate",
        "layers.router.choice_bias": f"{mlp}.gate.e_score_correction_bias",
    }


def expert_names(
    experts: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> dict[str, Stored]:
    """Where the parameters of experts stand that are stored one by one: `{experts}.3.{gate}.weight`."""
    names = {"gate": gate, "up": up, "down": down}
    return {f"layers.experts.{part}": Stack(Tensor(f"{experts}.{{expert}}.{name}")) for part, name in names.items()}
