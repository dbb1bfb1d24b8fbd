from __future__ import annotations

import math
from typing import Any

import pytest

from rayllm.errors import ConfigError
from rayllm.models.config_fields import ConfigFields, read_dtype, read_heads, read_rope, scaled_context
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
