from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rayllm.errors import ConfigError
from rayllm.weights.config_file import read_config, read_json, with_overrides


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"größe": 1}', encoding="utf-8")
    assert read_config(tmp_path) == {"größe": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "must hold a JSON object, not list"),
        (b"{", "is not valid JSON"),
        (b'{"a": "\xff"}', "is not valid JSON"),
        (b"[" * 200_000, "is nested too deeply"),
    ],
)
def test_what_is_no_object_is_refused_with_the_file(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_json(file)
    assert str(file) in str(caught.value)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="is not a regular file"):
        read_config(tmp_path)


def test_a_missing_folder_or_file_is_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "qwen").mkdir()
    with pytest.raises(ConfigError, match="does not exist; did you mean 'qwen'"):
        read_config(tmp_path / "qwne")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: No such file"):
        read_config(tmp_path / "qwen")


CONFIG: dict[str, Any] = {"a": 1, "nested": {"b": 2, "deeper": {"c": 3}}, "list": [1, 2]}
ROPE: dict[str, Any] = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        ({}, {}),
        ({"a": 5, "new": None}, {"a": 5, "new": None}),
        ({"nested": {"deeper": {"d": 4}}}, {"nested": {"b": 2, "deeper": {"c": 3, "d": 4}}}),
        ({"nested": [7]}, {"nested": [7]}),
        ({"list": [3]}, {"list": [3]}),
        ({"a": {"x": 1}}, {"a": {"x": 1}}),
    ],
)
def test_overrides_replace_values_and_merge_objects(overrides: dict[str, Any], changed: dict[str, Any]) -> None:
    assert with_overrides(CONFIG, overrides) == {**CONFIG, **changed}
    assert CONFIG["nested"] == {"b": 2, "deeper": {"c": 3}}


def test_overrides_at_the_old_place_of_rotary_fields_count() -> None:
    assert with_overrides(ROPE, {"rope_theta": 5.0})["rope_parameters"] == {"rope_theta": 5.0, "rope_type": "default"}
    yarn = {"type": "yarn", "factor": 2.0}
    found = with_overrides(ROPE, {"rope_scaling": yarn, "partial_rotary_factor": 0.5})["rope_parameters"]
    assert found == {
        "rope_theta": 1e4,
        "rope_type": "yarn",
        "type": "yarn",
        "factor": 2.0,
        "partial_rotary_factor": 0.5,
    }
    assert "rope_parameters" not in with_overrides({"rope_theta": 1.0}, {"rope_theta": 5.0})


def test_overrides_that_say_too_little_are_refused() -> None:
    by_type = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}}
    with pytest.raises(ConfigError, match=r"hf_overrides\.rope_theta: .*for full_attention, sliding_attention: give"):
        with_overrides(by_type, {"rope_theta": 5.0})
    with pytest.raises(ConfigError, match=r"hf_overrides\.rope_scaling='yarn' must be an object"):
        with_overrides(ROPE, {"rope_scaling": "yarn"})


def test_an_override_of_a_field_that_is_not_there_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        assert with_overrides({"a": 1}, {"a": 2, "rope_theta": 1e6}) == {"a": 2, "rope_theta": 1e6}
        assert not caplog.text
        assert with_overrides({"a": 1}, {"nonsense": 3})["nonsense"] == 3
    assert "does not have: nonsense" in caplog.text
