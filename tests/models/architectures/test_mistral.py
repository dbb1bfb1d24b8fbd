from __future__ import annotations

from typing import Any

import pytest
from models.architectures.test_llama import CONFIG

from rayllm.models.architectures import mistral


@pytest.mark.parametrize(
    ("fields", "window"), [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 7}, 7)]
)
def test_every_layer_has_the_window_and_no_bias(fields: dict[str, Any], window: int | None) -> None:
    spec = mistral.spec({**CONFIG, "attention_bias": True, **fields})
    assert spec.architecture == "MistralForCausalLM"
    assert spec.max_model_len == 131_072
    assert {layer.attention.window for layer in spec.layers} == {window}
    assert not any(layer.attention.qkv_bias or layer.attention.out_bias for layer in spec.layers)
