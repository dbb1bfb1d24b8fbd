from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from golden import check_against_transformers, largest_difference, make_sequences, transformers_log_probs
from models.architectures.test_gemma import TINY as GEMMA
from models.architectures.test_llama import CONFIG
from ranks import RankPool
from tiny import make_checkpoint
from transformers import Gemma2Config

from rayllm.errors import ConfigError
from rayllm.models.architectures import gemma2

TINY: dict[str, Any] = {
    **GEMMA, "num_key_value_heads": 2, "num_hidden_layers": 3, "sliding_window": 7, "query_pre_attn_scalar": 12,
    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [{}, {"attention_bias": True, "final_logit_softcapping": None, "attn_logit_softcapping": None}],
    ids=["caps", "biases"],
)
def test_log_probabilities_equal_transformers(fields: dict[str, Any], tmp_path: Path, two_ranks: RankPool) -> None:
    config = Gemma2Config(**{**TINY, **fields})
    check_against_transformers(make_checkpoint(tmp_path, config, tokenizer=False), two_ranks)


@pytest.mark.parametrize("field", ["attn_logit_softcapping", "final_logit_softcapping", "sliding_window"])
def test_what_the_log_probabilities_are_compared_by_takes_effect(field: str, tmp_path: Path) -> None:
    sequences = make_sequences(288, (37,))
    found = [
        transformers_log_probs(
            make_checkpoint(tmp_path / str(value), Gemma2Config(**fields), tokenizer=False), sequences
        )
        for value in (TINY[field], 100 if field == "sliding_window" else 100.0)
        for fields in [{**TINY, field: value}]
    ]
    assert largest_difference(*found) > 0.01


def test_every_other_layer_has_a_window_where_the_config_is_silent() -> None:
    spec = gemma2.spec(CONFIG)
    assert [layer.attention.window for layer in spec.layers] == [4096, None, 4096]
    assert {layer.attention.soft_cap for layer in spec.layers} == {50.0}
    assert (spec.logits_soft_cap, spec.layers[0].attention.scale) == (30.0, 1 / 16)
    types = ["full_attention", "sliding_attention", "full_attention"]
    layers = gemma2.spec({**CONFIG, "layer_types": types, "sliding_window": 5}).layers
    assert [layer.attention.window for layer in layers] == [None, 5, None]


def test_a_window_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="sliding_window is null"):
        gemma2.spec({**CONFIG, "sliding_window": None})
