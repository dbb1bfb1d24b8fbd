from __future__ import annotations

from typing import Any

import pytest
from models.architectures.test_llama import CONFIG

from rayllm.errors import ConfigError
from rayllm.models.architectures import qwen2


def _windows(**fields: Any) -> list[int | None]:
    return [layer.attention.window for layer in qwen2.spec({**CONFIG, **fields}).layers]


def test_queries_keys_and_values_have_biases_and_the_output_has_none() -> None:
    spec = qwen2.spec(CONFIG)
    assert spec.architecture == "Qwen2ForCausalLM"
    assert {(layer.attention.qkv_bias, layer.attention.out_bias) for layer in spec.layers} == {(True, False)}


def test_windows_stand_where_the_config_has_them() -> None:
    assert _windows() == _windows(sliding_window=9) == [None] * 3
    assert _windows(use_sliding_window=True, sliding_window=None) == [None] * 3
    assert _windows(use_sliding_window=True, sliding_window=9, max_window_layers=1) == [None, 9, 9]
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert _windows(use_sliding_window=True, sliding_window=9, layer_types=types) == [9, None, 9]


@pytest.mark.parametrize(
    ("types", "message"),
    [(["full_attention"], "must be a list of num_hidden_layers=3"), (["linear_attention"] * 3, "'linear_attention'")],
)
def test_layer_types_that_do_not_fit_are_refused(types: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _windows(use_sliding_window=True, layer_types=types)
