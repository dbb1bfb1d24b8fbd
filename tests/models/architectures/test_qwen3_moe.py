from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from golden import check_against_transformers
from mixtures import SIZES, make_mixture
from models.architectures.test_llama import CONFIG
from ranks import RankPool

from rayllm.models.architectures import qwen3_moe
from rayllm.spec import MlpSpec, SparseMlpSpec

EXPERTS: dict[str, Any] = {"num_experts": 6, "moe_intermediate_size": 32, "intermediate_size": 96}


@pytest.mark.parametrize(
    "fields",
    [{"norm_topk_prob": True, "num_experts_per_tok": 3}, {"mlp_only_layers": [1], "use_sliding_window": True}],
    ids=["renormalized", "a dense layer, windows"],
)
def test_log_probabilities_equal_transformers(fields: dict[str, Any], tmp_path: Path, two_ranks: RankPool) -> None:
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(**{**SIZES, **EXPERTS, "head_dim": 32, "sliding_window": 7, **fields})
    check_against_transformers(make_mixture(tmp_path, config), two_ranks, expert_parallel=True)


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_goes_by_the_name_of_either_version_of_transformers(name: str) -> None:
    layer = qwen3_moe.spec({**CONFIG, "moe_intermediate_size": 32, name: 12}).layers[0].feed_forward
    assert isinstance(layer, SparseMlpSpec)
    assert (layer.router.num_experts, layer.router.top_k, layer.shared) == (12, 8, None)


def test_a_window_is_on_every_layer_where_it_is_asked_for() -> None:
    config = {**CONFIG, **EXPERTS, "num_experts_per_tok": 2, "sliding_window": 5, "mlp_only_layers": [1]}
    spec = qwen3_moe.spec({**config, "use_sliding_window": True})
    assert [layer.attention.window for layer in spec.layers] == [5, 5, 5]
    assert spec.layers[1].feed_forward == MlpSpec(96, "silu", gated=True)
    assert {layer.attention.window for layer in qwen3_moe.spec(config).layers} == {None}
