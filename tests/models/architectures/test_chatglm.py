from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chatglm_made import as_chatglm, make_glm
from golden import check_bfloat16, check_log_probs, make_sequences, transformers_log_probs
from ranks import RankPool
from teacher import load

from rayllm.distributed.groups import TensorParallel
from rayllm.errors import ConfigError
from rayllm.models.architectures import chatglm
from rayllm.models.registry import spec_of
from rayllm.spec import NormSpec, RopeSpec

GLM4_9B_CHAT: dict[str, Any] = {
    "architectures": ["ChatGLMModel"], "model_type": "chatglm", "hidden_size": 4096, "num_layers": 40,
    "num_attention_heads": 32, "kv_channels": 128, "multi_query_attention": True, "multi_query_group_num": 2,
    "ffn_hidden_size": 13696, "padded_vocab_size": 151552, "seq_length": 131072, "layernorm_epsilon": 1.5625e-7,
    "rope_ratio": 500, "add_qkv_bias": True, "add_bias_linear": False, "original_rope": True, "rmsnorm": True,
    "post_layer_norm": True, "apply_residual_connection_post_layernorm": False, "torch_dtype": "bfloat16",
    "apply_query_key_layer_scaling": True, "fp32_residual_connection": False, "tie_word_embeddings": False,
    "eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329,
}  # fmt: skip


@pytest.mark.parametrize("num_shards", [0, 3], ids=["safetensors", "bin shards"])
def test_log_probabilities_equal_those_of_glm_with_the_same_weights(
    num_shards: int, tmp_path: Path, two_ranks: RankPool
) -> None:
    glm = make_glm(tmp_path / "glm", rope_ratio=1.0 if num_shards else 500.0)
    path = as_chatglm(glm, tmp_path / "chatglm", num_shards=num_shards)
    sequences = make_sequences(288)
    expected = transformers_log_probs(glm, sequences)
    check_log_probs(path, sequences, expected, two_ranks)
    check_bfloat16(path, sequences, expected, reference=glm)


def test_other_ratios_turn_otherwise(tmp_path: Path) -> None:
    glm = make_glm(tmp_path / "glm", rope_ratio=500.0)
    path = as_chatglm(glm, tmp_path / "chatglm", rope_ratio=50)
    sequences = make_sequences(288)
    with pytest.raises(AssertionError, match="one rank"):
        check_log_probs(path, sequences, transformers_log_probs(glm, sequences), None)


def test_no_tensor_of_the_file_counts_as_unknown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = as_chatglm(make_glm(tmp_path / "glm"), tmp_path / "chatglm")
    with caplog.at_level(logging.WARNING):
        load(TensorParallel(), path)
    assert "are not used" not in caplog.text


def test_the_published_config_is_read_under_both_names() -> None:
    for name in ("ChatGLMModel", "ChatGLMForConditionalGeneration"):
        spec = spec_of({**GLM4_9B_CHAT, "architectures": [name]})
        attention = spec.layers[0].attention
        assert attention.rope == RopeSpec(5e6, 64, in_pairs=True)
        assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (32, 2, 128)
        assert (attention.qkv_bias, attention.out_bias) == (True, False)
        assert spec.final_norm == NormSpec("rms", 1.5625e-7)
        assert (spec.dtype, spec.vocab_size, spec.num_layers) == ("bfloat16", 151552, 40)
        assert (spec.max_model_len, spec.tied_embeddings) == (131072, False)


def test_fields_that_differ_from_the_published_ones_are_fields_of_the_spec() -> None:
    base = chatglm.spec(GLM4_9B_CHAT)

    def changed(**fields: Any) -> Any:
        return chatglm.spec({**GLM4_9B_CHAT, **fields})

    assert changed(post_layer_norm=False) == replace(base, final_norm=None)
    assert changed(rmsnorm=False).final_norm == NormSpec("layer", 1.5625e-7)
    layer = changed(add_bias_linear=True, add_qkv_bias=False).layers[0]
    assert (layer.attention.qkv_bias, layer.attention.out_bias, layer.feed_forward.bias) == (True, True, True)
    assert changed(original_rope=False).layers[0].attention.rope == RopeSpec(5e6, 64)
    assert changed(rope_ratio=None).layers[0].attention.rope == RopeSpec(1e4, 64, in_pairs=True)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("quantization_bit", 4, "quantization_bit=4: .*not quantized"),
        ("apply_residual_connection_post_layernorm", True, "residual after the norm"),
        ("interleaved_qkv", True, "interleaved_qkv=True"),
        ("fp32_residual_connection", True, "fp32_residual_connection=True"),
        ("position_encoding_2d", True, "use chatglm2-6b or later"),
        ("pre_seq_len", 128, "pre_seq_len=128: tuned prefixes"),
        ("vision_config", {"hidden_size": 1}, "vision_config=.*the one for text"),
        ("multi_query_attention", False, "multi_query_attention=False is not supported"),
        ("multi_query_group_num", 5, "num_attention_heads=32 is not a multiple of multi_query_group_num=5"),
        ("kv_channels", 6, "kv_channels=6 must be a multiple of 4"),
        ("num_layers", -1, r"num_layers=-1 is outside \[1, 1024\]"),
        ("padded_vocab_size", "x", "padded_vocab_size='x' must be an integer"),
        ("rope_ratio", 0, "rope_ratio=0 is outside"),
    ],
)
def test_what_asks_for_other_code_is_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chatglm.spec({**GLM4_9B_CHAT, field: value})
