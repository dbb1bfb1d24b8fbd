from __future__ import annotations

from typing import Any

import pytest

from rayllm.errors import ConfigError
from rayllm.models.architectures import llama
from rayllm.spec import MlpSpec, NormSpec, RopeSpec

CONFIG: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
    "hidden_act": "silu", "num_hidden_layers": 3, "vocab_size": 100, "rms_norm_eps": 1e-5,
}  # fmt: skip


def test_a_config_becomes_equal_layers_with_rotation_and_a_gated_feed_forward() -> None:
    spec = llama.spec(CONFIG)
    assert len(set(spec.layers)) == 1
    assert len(spec.layers) == 3
    attention = spec.layers[0].attention
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim, attention.scale) == (4, 2, 16, 0.25)
    assert attention.rope == RopeSpec(10_000.0, 16)
    assert (attention.qkv_bias, attention.out_bias, attention.window) == (False, False, None)
    assert spec.layers[0].feed_forward == MlpSpec(96, "silu", gated=True)
    assert spec.final_norm == spec.layers[0].norm == NormSpec("rms", 1e-5)
    assert (spec.max_model_len, spec.tied_embeddings, spec.dtype) == (2048, False, "float32")


def test_biases_and_tied_embeddings_are_fields() -> None:
    spec = llama.spec({**CONFIG, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True})
    attention = spec.layers[0].attention
    assert (attention.qkv_bias, attention.out_bias, spec.layers[0].feed_forward.bias) == (True, True, True)
    assert spec.tied_embeddings


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ConfigError, match="intermediate_size is missing"):
        llama.spec({name: value for name, value in CONFIG.items() if name != "intermediate_size"})
