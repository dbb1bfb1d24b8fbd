from __future__ import annotations

import os
from pathlib import Path

import pytest

from rayllm.errors import ConfigError
from rayllm.machine.ray_token import ensure_ray_token, read_ray_token


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after the test: what it puts into the environment goes."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")


def test_a_token_is_made_once_in_the_users_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_ray_token() == ""
    ensure_ray_token()
    token = read_ray_token()
    assert len(token) == 64
    ensure_ray_token()
    assert read_ray_token() == token
    [file] = (tmp_path / ".ray").iterdir()
    assert (file.read_text(), file.stat().st_mode & 0o777) == (token, 0o600)
    assert not os.environ["RAY_AUTH_TOKEN"]


def test_a_token_file_that_others_can_read_is_closed_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x" * 64)
    (tmp_path / ".ray" / "auth_token").chmod(0o644)
    ensure_ray_token()
    assert read_ray_token() == "x" * 64
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("home", ["/proc/no-such-home", "/dev/null"])
def test_where_the_home_folder_cannot_be_written_the_token_is_handed_down_in_the_environment(
    home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", home)
    ensure_ray_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert read_ray_token() == os.environ["RAY_AUTH_TOKEN"]


def test_a_given_token_is_taken_and_a_named_file_must_hold_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ConfigError, match=r"RAY_AUTH_TOKEN_PATH='.*/token' is not a file with a token"):
        ensure_ray_token()
    (tmp_path / "token").write_text("of the file\n")
    ensure_ray_token()
    assert read_ray_token() == "of the file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the environment")
    assert read_ray_token() == "of the environment"
