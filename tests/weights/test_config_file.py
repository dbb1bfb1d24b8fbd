from __future__ import annotations

import os
from pathlib import Path

import pytest

from rayllm.errors import ConfigError
from rayllm.weights.config_file import read_config, read_json


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
