from __future__ import annotations

from typing import Any

import pytest

from rayllm.errors import ConfigError
from rayllm.models.config_fields import ConfigFields
from rayllm.models.sparse_fields import (
    expert_names,
    read_grouped_router,
    read_num_experts,
    sparse_after_dense,
    sparse_by_step,
)
from rayllm.spec import RouterSpec
from rayllm.weights.stored import Stack, Tensor

GROUPED = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}


def test_a_router_with_groups_is_read() -> None:
    router = read_grouped_router(ConfigFields(GROUPED), scoring="sigmoid", renormalize=True)
    assert router == RouterSpec(8, 3, "sigmoid", renormalize=True, scale=2.5, num_groups=4, top_groups=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 3}, r"n_routed_experts=8 is not a multiple of n_group=3"),
        ({"topk_group": 5}, r"topk_group=5 is outside \[1, 4\]"),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok=5 is more than the 4 experts of topk_group=2 groups"),
        ({"n_group": 8, "topk_group": 4}, r"n_group=8 leaves one expert in each group"),
        ({"n_routed_experts": 0}, r"n_routed_experts=0 is outside"),
        ({"routed_scaling_factor": -1}, r"routed_scaling_factor=-1 is outside"),
    ],
)
def test_a_router_that_cannot_choose_is_refused(changes: dict[str, Any], message: str) -> None:
    fields = ConfigFields({**GROUPED, **changes})
    with pytest.raises(ConfigError, match=message):
        read_grouped_router(fields, scoring="sigmoid", renormalize=True, group_score="top2_sum")


def test_the_number_of_experts_has_three_names() -> None:
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        assert read_num_experts(ConfigFields({name: 4, "num_experts_per_tok": 2})) == (4, 2)
    assert read_num_experts(ConfigFields({"num_experts_per_tok": 2}), default=8) == (8, 2)
    with pytest.raises(ConfigError, match="num_experts is missing"):
        read_num_experts(ConfigFields({"num_experts_per_tok": 2}))


def test_which_layers_are_sparse() -> None:
    by_step = ConfigFields({"decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert sparse_by_step(by_step, 6) == [False, True, False, False, False, True]
    assert sparse_by_step(ConfigFields({"mlp_only_layers": None}), 2) == [True, True]
    assert sparse_after_dense(ConfigFields({"first_k_dense_replace": 1}), 3) == [False, True, True]
    assert sparse_after_dense(ConfigFields({}), 2) == [True, True]


@pytest.mark.parametrize("layers", ["all", [4], [-1], [True], [1.0]])
def test_dense_layers_that_are_none_are_refused(layers: Any) -> None:
    with pytest.raises(ConfigError, match=r"mlp_only_layers=.* must be a list of numbers of layers, 0 to 3"):
        sparse_by_step(ConfigFields({"mlp_only_layers": layers}), 4)


def test_experts_stored_one_by_one_are_stacks() -> None:
    names = expert_names("layers.{}.experts", up="w3")
    assert names["layers.experts.up"] == Stack(Tensor("layers.{}.experts.{expert}.w3"))
    assert set(names) == {"layers.experts.gate", "layers.experts.up", "layers.experts.down"}
