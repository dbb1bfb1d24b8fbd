"""A client of the server that the flags name."""

from __future__ import annotations

import pytest

from rayllm.cli.connect import add_server_flags, connected
from rayllm.cli.flags import Parser


def test_the_flags_name_the_server_and_the_key() -> None:
    parser = Parser(prog="rayllm chat")
    add_server_flags(parser)
    given = parser.parse(["--url", "http://127.0.0.1:9/v1", "--api-key", "abc", "--served-model-name", "m"])
    with connected(given) as client:
        assert client.url == "http://127.0.0.1:9"
        assert client._http.headers["authorization"] == "Bearer abc"


def test_without_a_flag_the_key_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLLM_API_KEY", "of-the-environment")
    with connected({"url": "http://127.0.0.1:9"}) as client:
        assert client._http.headers["authorization"] == "Bearer of-the-environment"


def test_the_client_is_closed_however_the_block_ends() -> None:
    with pytest.raises(KeyError), connected({"url": "http://127.0.0.1:9"}) as client:
        raise KeyError
    assert client._http.is_closed
