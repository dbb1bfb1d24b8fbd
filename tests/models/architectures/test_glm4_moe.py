from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from golden import check_against_transformers
from mixtures import SIZES, make_mixture
from models.architectures.test_llama import CONFIG
from ranks import RankPool

from rayllm.models.architectures import glm4_moe
from rayllm.models.registry import left_out
from rayllm.spec import MlpSpec, SparseMlpSpec

EXPERTS: dict[str, Any] = {"n_routed_experts": 8, "moe_intermediate_size": 32, "intermediate_size": 96}


@pytest.mark.parametrize(
    "fields",
    [
        {"use_qk_norm": True, "routed_scaling_factor": 2.5, "num_experts_per_tok": 3},
        {"attention_bias": True, "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "norm_topk_prob": False},
    ],
    ids=["qk norms, scaled", "biases, two shared experts, groups"],
)
def test_log_probabilities_equal_transformers(fields: dict[str, Any], tmp_path: Path, two_ranks: RankPool) -> None:
    from transformers import Glm4MoeConfig

    config = Glm4MoeConfig(**{**SIZES, **EXPERTS, "head_dim": 16, **fields})
    check_against_transformers(make_mixture(tmp_path, config), two_ranks, expert_parallel=True)


def test_the_first_layers_are_dense_and_shared_experts_are_one_layer_of_their_joint_width() -> None:
    spec = glm4_moe.spec({**CONFIG, **EXPERTS, "first_k_dense_replace": 2, "n_shared_experts": 3})
    first, second, third = (layer.feed_forward for layer in spec.layers)
    assert first == second == MlpSpec(96, "silu", gated=True)
    assert isinstance(third, SparseMlpSpec)
    assert third.shared == MlpSpec(96, "silu", gated=True)
    assert third.router.has_choice_bias
    attention = spec.layers[0].attention
    assert attention.rope is not None
    assert (attention.rope.rotary_dim, attention.rope.in_pairs) == (8, False)


def test_the_module_that_predicts_further_tokens_is_left_out_knowingly() -> None:
    spec = glm4_moe.spec({**CONFIG, **EXPERTS})
    assert left_out(spec) == ["model.layers.3."]
