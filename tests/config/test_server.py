from __future__ import annotations

from pathlib import Path

import pytest

from rayllm.config import ServerConfig
from rayllm.errors import ConfigError


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("example.org", False),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, is_loopback: bool) -> None:
    assert ServerConfig(host=host).is_loopback is is_loopback


def test_keys_are_given_or_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\n\n two \n")
    assert ServerConfig.parse({"api_key": "plain"}).read_api_keys() == ("plain",)
    assert ServerConfig(api_key=("plain", f"@{tmp_path}/keys")).read_api_keys() == ("plain", "one", "two")


@pytest.mark.parametrize(
    ("key", "message"), [("", "api_key is empty"), ("@/no/such", "cannot be read"), ("@EMPTY", "holds no key")]
)
def test_a_key_that_is_none_is_refused(key: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match=message):
        ServerConfig(api_key=(key.replace("EMPTY", f"{tmp_path}/empty"),)).read_api_keys()
