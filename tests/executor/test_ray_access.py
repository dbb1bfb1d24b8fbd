from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from rayllm.errors import ConfigError, EngineUnreachableError
from rayllm.executor.ray_access import Answer, ask_head, check_access

TOKEN = "0123456789abcdef" * 4


class _Head(grpc.GenericRpcHandler):
    """Answers as a cluster's head does: all who have its token, or all where it has none."""

    def __init__(self, token: str):
        self._token = token

    def service(self, handler_call_details: Any) -> Any:
        shown = dict(handler_call_details.invocation_metadata).get("authorization", "")

        def answer(request: bytes, context: Any) -> bytes:
            if self._token and shown != f"Bearer {self._token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
def start_head() -> Iterator[Callable[[str], str]]:
    servers = []

    def start(token: str = "") -> str:
        servers.append(grpc.server(ThreadPoolExecutor(1), handlers=[_Head(token)]))
        port = servers[-1].add_insecure_port("127.0.0.1:0")
        servers[-1].start()
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None).wait()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without a token, and an environment that says nothing of one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".ray").mkdir()
    return tmp_path


def test_a_cluster_says_whether_it_asks_for_a_token(start_head: Callable[..., str], home: Path) -> None:
    assert not check_access(start_head())
    address = start_head(TOKEN)
    (home / ".ray" / "auth_token").write_text(TOKEN + "\n")
    assert check_access(address)
    assert (ask_head(address), ask_head(address, TOKEN)) == (Answer.REFUSED, Answer.WELCOME)


def test_the_token_is_looked_for_where_ray_does(
    start_head: Callable[..., str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = start_head(TOKEN)
    (home / ".ray" / "auth_token").write_text("another")
    (home / "token").write_text(TOKEN)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "token"))
    assert check_access(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "none"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert check_access(address)


@pytest.mark.parametrize("where", ["file", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN"])
def test_a_wrong_token_is_named_by_where_it_is(
    start_head: Callable[..., str], home: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    address = start_head(TOKEN)
    file = home / ".ray" / "auth_token"
    file.write_text("b" * 64)
    named = {"file": str(file), "RAY_AUTH_TOKEN_PATH": f"RAY_AUTH_TOKEN_PATH={file}", "RAY_AUTH_TOKEN": where}[where]
    if where != "file":
        monkeypatch.setenv(where, str(file) if where == "RAY_AUTH_TOKEN_PATH" else "b" * 64)
    with pytest.raises(ConfigError) as refusal:
        check_access(address)
    message = str(refusal.value)
    assert f"RAY_ADDRESS='{address}' does not accept the token in {named}: it is another cluster's; copy" in message
    assert "b" * 64 not in message


def test_no_token_is_told_by_where_it_was_looked_for(
    start_head: Callable[..., str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = start_head(TOKEN)
    with pytest.raises(ConfigError, match=r"requires a token, but .*auth_token cannot be read: No such file.*not set"):
        check_access(address)
    assert not (home / ".ray" / "auth_token").exists()
    (home / ".ray" / "auth_token").write_text(" ")
    with pytest.raises(ConfigError, match="auth_token is empty: copy"):
        check_access(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/none/token")
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN_PATH=/none/token cannot be read: No such file"):
        check_access(address)


def test_a_mode_that_is_not_the_clusters_is_told(
    start_head: Callable[..., str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ConfigError, match=r"RAY_AUTH_MODE=disabled, and .* requires a token: unset"):
        check_access(start_head(TOKEN))
    assert not check_access(start_head())
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ConfigError, match=r"RAY_AUTH_MODE=token, and .* runs without tokens: unset"):
        check_access(start_head())


def test_what_is_no_ray_is_told(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert ask_head(address, timeout_s=0.2) is Answer.NONE
    with pytest.raises(EngineUnreachableError, match=f"at RAY_ADDRESS='{address}' does not answer as the head of a"):
        check_access(address)


@pytest.mark.cluster
def test_a_real_cluster_refuses_another_token_and_whoever_connects_says_so_at_once(
    ray_cluster: None, llama_path: Path
) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {"RAY_ADDRESS": address, "RAY_AUTH_TOKEN": "c" * 64}
    code = f"import rayllm; rayllm.LLM({str(llama_path)!r}, distributed_executor_backend='ray')"
    for command in ([sys.executable, "-c", code], [sys.executable, "-m", "rayllm", "serve", str(llama_path)]):
        began_s = time.monotonic()
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        expected = f"at RAY_ADDRESS='{address}' does not accept the token in RAY_AUTH_TOKEN"
        assert expected in ended.stderr.splitlines()[-1], ended.stderr
        assert time.monotonic() - began_s < 30  # Ray itself takes longer; the imports are most of it
