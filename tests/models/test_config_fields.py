from __future__ import annotations

import math
from typing import Any

import pytest

from rayllm.errors import ConfigError
from rayllm.models.config_fields import (
    ConfigFields,
    read_activation,
    read_dtype,
    read_heads,
    read_layer_types,
    read_rope,
    scaled_context,
    text_config,
)
from rayllm.spec import RopeSpec


def test_a_field_that_is_absent_or_null_takes_its_default() -> None:
    for config in ({}, {"size": None}):
        assert ConfigFields(config).integer("size", 1, 9, default=4) == 4
    with pytest.raises(ConfigError, match="size is missing"):
        ConfigFields({}).integer("size", 1, 9)
    with pytest.raises(ConfigError, match="size is null"):
        ConfigFields({"size": None}).integer("size", 1, 9)


@pytest.mark.parametrize("value", [True, 1.0, "1", 0, 10])
def test_an_integer_is_neither_a_flag_nor_a_float_and_stays_in_its_range(value: Any) -> None:
    with pytest.raises(ConfigError, match="size="):
        ConfigFields({"size": value}).integer("size", 1, 9)


def test_a_field_of_a_section_is_named_with_it() -> None:
    section = ConfigFields({"rope": {"theta": math.nan}}).section("rope")
    assert section is not None
    with pytest.raises(ConfigError, match=r"rope\.theta=nan is outside \[0, 1\]"):
        section.number("theta", 0, 1)
    assert ConfigFields({"rope": None}).section("rope") is None


def test_a_long_value_is_cut_in_the_error() -> None:
    with pytest.raises(ConfigError) as caught:
        ConfigFields({"kind": "x" * 1000}).choice("kind", {"a": 1})
    assert len(str(caught.value)) < 150


def test_the_dtype_of_transformers_5_wins_over_the_older_field() -> None:
    assert read_dtype(ConfigFields({"torch_dtype": "float16"})) == "float16"
    assert read_dtype(ConfigFields({"torch_dtype": "float16", "dtype": "bfloat16"})) == "bfloat16"
    assert read_dtype(ConfigFields({})) == "float32"


def test_heads_default_to_multi_head_attention_over_the_hidden_size() -> None:
    assert read_heads(ConfigFields({"num_attention_heads": 4}), 64) == (4, 4, 16)
    with pytest.raises(ConfigError, match="hidden_size=66 is not a multiple"):
        read_heads(ConfigFields({"num_attention_heads": 4}), 66)


def test_both_ways_to_write_a_rope_are_read() -> None:
    now = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0, "partial_rotary_factor": 0.5}}
    before = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    expected = RopeSpec(5e5, 8, "linear", factor=2.0)
    assert read_rope(ConfigFields(now), 16, 512) == read_rope(ConfigFields(before), 16, 512) == expected
    assert scaled_context(expected, 512) == 1024


def test_yarn_infers_its_factor_and_attention_factor() -> None:
    fields = ConfigFields({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 128}})
    rope = read_rope(fields, 16, 512)
    assert (rope.factor, rope.original_max_positions) == (4.0, 128)
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4.0) + 1.0)
    assert scaled_context(rope, 512) == 512


def test_dynamic_scaling_changes_nothing_within_the_context_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    fields = ConfigFields({"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    with caplog.at_level("INFO", logger="rayllm.models"):
        assert read_rope(fields, 16, 512) == RopeSpec(10_000.0, 16)
    (record,) = caplog.records
    assert "changes nothing up to max_position_embeddings=512, where the context ends" in record.getMessage()


def _longrope(**fields: Any) -> ConfigFields:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2] * 8, "original_max_position_embeddings": 64}
    return ConfigFields({"rope_scaling": {"type": "longrope", **factors, **fields}})


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
def test_longrope_has_an_embedding_for_each_side_of_the_pretrained_context(name: str) -> None:
    rope = read_rope(_longrope(type=name), 16, 512)
    assert (rope.scaling, rope.original_max_positions, rope.pair_factors) == ("longrope", 64, (1.0,) * 8)
    assert rope.beyond is not None
    assert (rope.beyond.pair_factors, rope.beyond.beyond) == ((2.0,) * 8, None)
    expected = math.sqrt(1 + math.log(512 / 64) / math.log(64))
    assert rope.attention_factor == rope.beyond.attention_factor == pytest.approx(expected)
    assert scaled_context(rope, 512) == 512


def test_longrope_may_give_its_factors_of_attention() -> None:
    rope = read_rope(_longrope(attention_factor=1.5, long_mscale=1.25), 16, 512)
    assert rope.beyond is not None
    assert (rope.attention_factor, rope.beyond.attention_factor) == (1.5, 1.25)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"long_factor": [1.0] * 7}, r"rope_scaling\.long_factor=\[.*must be a list of 8 numbers"),
        ({"short_factor": None}, r"rope_scaling\.short_factor is null"),
        ({"short_factor": [1.0] * 7 + ["x"]}, r"rope_scaling\.short_factor\.7='x' must be a number"),
        ({"short_factor": [0.0] * 8}, r"rope_scaling\.short_factor\.0=0\.0 is outside"),
        ({"original_max_position_embeddings": 1}, r"original_max_position_embeddings=1 is outside"),
        ({"full_attention": {}}, r"rope_parameters\.full_attention: this architecture has one embedding"),
    ],
)
def test_a_bad_longrope_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_rope(_longrope(**fields), 16, 512)


def test_layer_types_are_checked() -> None:
    assert read_layer_types(ConfigFields({}), 1, ["full_attention"]) == ["full_attention"]
    found = read_layer_types(ConfigFields({"layer_types": ["sliding_attention"]}), 1, ())
    assert found == ["sliding_attention"]
    with pytest.raises(ConfigError, match="layer_types must be a list of num_hidden_layers=2 names"):
        read_layer_types(ConfigFields({"layer_types": ["full_attention"]}), 2, ())
    with pytest.raises(ConfigError, match=r"layer_types holds \[\]; known are full_attention, sliding_attention"):
        read_layer_types(ConfigFields({"layer_types": [[]]}), 1, ())


def test_the_text_part_takes_over_what_is_said_for_all_parts() -> None:
    whole = {"text_config": {"hidden_size": 8, "dtype": "float32"}, "dtype": "bfloat16", "tie_word_embeddings": False}
    assert text_config(whole) == {"hidden_size": 8, "dtype": "bfloat16", "tie_word_embeddings": False}
    assert text_config({"hidden_size": 8}) == {"hidden_size": 8}


@pytest.mark.parametrize(
    "name", ["silu", "swish", "relu", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate",
             "gelu_python_tanh", "gelu_pytorch_tanh"]
)  # fmt: skip
def test_an_activation_of_each_name_is_that_of_transformers(name: str) -> None:
    import torch
    from transformers.activations import ACT2FN

    from rayllm_kernels.activation import ACTIVATIONS

    x = torch.linspace(-6, 6, 501, dtype=torch.float64)
    found = ACTIVATIONS[read_activation(ConfigFields({"act": name}), "act")](x)
    assert torch.allclose(found, ACT2FN[name](x), atol=1e-9)
