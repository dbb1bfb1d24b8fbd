from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from golden import check_against_transformers
from mixtures import SIZES, make_mixture
from models.architectures.test_llama import CONFIG
from ranks import RankPool

from rayllm.errors import ConfigError
from rayllm.models.architectures import qwen2_moe
from rayllm.spec import MlpSpec, SparseMlpSpec

EXPERTS: dict[str, Any] = {
    "num_experts": 6,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "intermediate_size": 96,
}


@pytest.mark.parametrize(
    "fields",
    [{}, {"norm_topk_prob": True, "decoder_sparse_step": 2}, {"mlp_only_layers": [0], "use_sliding_window": True}],
    ids=["scores as they are", "renormalized, every second layer", "dense first, windows"],
)
def test_log_probabilities_equal_transformers(fields: dict[str, Any], tmp_path: Path, two_ranks: RankPool) -> None:
    from transformers import Qwen2MoeConfig

    config = Qwen2MoeConfig(**SIZES, **EXPERTS, sliding_window=7, max_window_layers=2, **fields)
    check_against_transformers(make_mixture(tmp_path, config), two_ranks, expert_parallel=True)


def test_layers_are_sparse_by_step_unless_they_are_named_dense() -> None:
    spec = qwen2_moe.spec(
        {**CONFIG, **EXPERTS, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    )
    sparse = [isinstance(layer.feed_forward, SparseMlpSpec) for layer in spec.layers]
    assert sparse == [False, True, False, False, False, True]
    assert spec.layers[0].feed_forward == MlpSpec(96, "silu", gated=True)


def test_a_gated_shared_expert_stands_beside_the_others() -> None:
    layer = qwen2_moe.spec({**CONFIG, **EXPERTS}).layers[0].feed_forward
    assert isinstance(layer, SparseMlpSpec)
    assert (layer.shared, layer.shared_gate) == (MlpSpec(48, "silu", gated=True), True)
    assert not layer.router.renormalize


def test_more_experts_a_token_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_experts_per_tok=7 is outside \[1, 6\]"):
        qwen2_moe.spec({**CONFIG, **EXPERTS, "num_experts_per_tok": 7})
