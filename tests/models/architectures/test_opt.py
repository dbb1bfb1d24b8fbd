from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from golden import check_against_transformers
from ranks import RankPool
from tiny import make_checkpoint

from rayllm.errors import ConfigError
from rayllm.models.architectures import opt
from rayllm.spec import MlpSpec, PositionsSpec

CONFIG: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "ffn_dim": 96, "num_hidden_layers": 2, "vocab_size": 100,
    "max_position_embeddings": 256,
}  # fmt: skip


def test_positions_are_learned_and_everything_has_a_bias() -> None:
    spec = opt.spec(CONFIG)
    assert spec.positions == PositionsSpec(256, offset=2)
    assert spec.layers[0].feed_forward == MlpSpec(96, "relu", gated=False, bias=True)
    attention = spec.layers[0].attention
    assert (attention.rope, attention.num_kv_heads, attention.qkv_bias, attention.out_bias) == (None, 4, True, True)
    assert spec.tied_embeddings
    assert spec.layers[0].norm_placement == "input"
    assert spec.embedding_size == spec.hidden_size


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_narrower_than_the_layers_equal_transformers(
    tied: bool, tmp_path: Path, two_ranks: RankPool
) -> None:
    fields = {"word_embed_proj_dim": 24, "do_layer_norm_before": False, "tie_word_embeddings": tied, "vocab_size": 283}
    path = make_checkpoint(tmp_path, "opt", tokenizer=False, **fields)
    check_against_transformers(path, two_ranks)


@pytest.mark.parametrize(
    ("fields", "placement", "has_final_norm"),
    [
        ({}, "input", True),
        ({"do_layer_norm_before": False}, "sum", False),
        ({"_remove_final_layer_norm": True}, "input", False),
    ],
)
def test_norms_stand_where_the_config_has_them(fields: dict[str, Any], placement: str, has_final_norm: bool) -> None:
    spec = opt.spec({**CONFIG, **fields})
    assert {layer.norm_placement for layer in spec.layers} == {placement}
    assert (spec.final_norm is not None) == has_final_norm


@pytest.mark.parametrize(
    "fields", [{"word_embed_proj_dim": 0}, {"layer_norm_elementwise_affine": False}, {"num_attention_heads": 5}]
)
def test_what_is_not_served_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        opt.spec({**CONFIG, **fields})
