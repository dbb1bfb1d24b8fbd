from __future__ import annotations

from pathlib import Path
from typing import Any

from golden import check_against_transformers
from mixtures import SIZES, make_mixture
from models.architectures.test_llama import CONFIG
from ranks import RankPool

from rayllm.models.architectures import mixtral
from rayllm.spec import ExpertSpec, RouterSpec, SparseMlpSpec


def test_log_probabilities_equal_transformers(tmp_path: Path, two_ranks: RankPool) -> None:
    from transformers import MixtralConfig

    config = MixtralConfig(**SIZES, intermediate_size=48, num_local_experts=6, sliding_window=9)
    check_against_transformers(make_mixture(tmp_path, config), two_ranks, expert_parallel=True)


def test_every_layer_is_sparse_and_its_scores_are_renormalized() -> None:
    spec = mixtral.spec(CONFIG)
    expected = SparseMlpSpec(RouterSpec(8, 2, "softmax", renormalize=True), ExpertSpec(96, "silu"))
    assert {layer.feed_forward for layer in spec.layers} == {expected}


def test_fields_that_the_config_leaves_out_are_those_of_its_class() -> None:
    config: dict[str, Any] = {name: value for name, value in CONFIG.items() if name not in ("hidden_act",)}
    attention = mixtral.spec(config).layers[0].attention
    assert attention.window is None
    assert attention.rope is not None
    assert attention.rope.theta == 1e6
