from __future__ import annotations

import re
from pathlib import Path

import pytest

from rayllm.errors import ConfigError
from rayllm.settings_file import read_settings_file


def test_settings_are_named_as_flags_or_as_fields(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("max-num-seqs: 8\nport: 9000\n# a comment\nserved_model_name: m\n")
    assert read_settings_file(str(file)) == {"max_num_seqs": 8, "port": 9000, "served_model_name": "m"}
    file.write_text("# nothing\n")
    assert read_settings_file(str(file)) == {}


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("port: 1\n\nmax_num_sequs: 8\n", 3, "unknown setting 'max_num_sequs'; did you mean 'max_num_seqs'?"),
        ("# first\nport: many\n", 2, "port='many'"),
        ("port: 1\nmodel: ''\nport: 2\n", 3, "port is given in line 1 already"),
        ("max-num-seqs: 8\nmax_num_seqs: 9\n", 2, "max_num_seqs is given in line 1 already"),
        ("{port: 1,\n nonsense: 2}\n", 2, "unknown setting 'nonsense'"),
        ("port: 1\nquantization: awq\n", 2, "quantization"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(text: str, line: int, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="^" + re.escape(f"{file}:{line}: {reason}")) as caught:
        read_settings_file(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"port: [", "is not YAML"),
        (b"\xff\xfe", "is not YAML"),
        (b"- 1\n", "must hold lines of"),
        (b"1: 2", "must hold"),
    ],
)
def test_what_holds_no_settings_is_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_settings_file(str(file))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_settings_file(str(tmp_path / "missing.yaml"))
