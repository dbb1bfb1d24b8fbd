from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from rayllm.cli.addresses import DEFAULT_URL, http_settings, server_url
from rayllm.cli.client import ApiClient
from rayllm.cli.main import main
from rayllm.errors import EngineUnreachableError
from rayllm.machine.registry import listed

COMMANDS_OF_A_SERVER = ("status", "logs", "stop")


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("RLLM_LOG_DIR", str(tmp_path / "logs"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A listed one; its URL."""
    (tmp_path / "log").write_text("")
    with listed("serve", name="mine", model="m", url="http://127.0.0.1:9", log=tmp_path / "log", shutdown_timeout_s=0):
        yield "http://127.0.0.1:9"


@pytest.mark.parametrize("word", ["mine", "9", "127.0.0.1:9", "localhost:9", "http://127.0.0.1:9/v1/", "m", None])
def test_a_server_is_asked_for_by_any_of_its_words(word: str | None, server: str) -> None:
    assert server_url(word) == server


def test_an_address_need_not_be_listed(server: str) -> None:
    assert server_url("8123") == "http://127.0.0.1:8123"
    assert server_url("10.0.0.5:8000/v1") == "http://10.0.0.5:8000"
    assert server_url("https://example.org/v1") == "https://example.org"
    for word in ("mein", "99999", "0"):
        with pytest.raises(EngineUnreachableError, match=f"no server '{word}' is running here"):
            server_url(word)


def test_without_any_server_the_usual_address_is_asked() -> None:
    assert server_url(None) == DEFAULT_URL


@pytest.mark.parametrize("command", COMMANDS_OF_A_SERVER)
def test_verbs_of_a_server_say_which_run_where_the_word_is_wrong(
    command: str, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "mien"]) == 3
    said = capsys.readouterr().err
    assert "no server 'mien' is running here" in said
    assert "'mine': pid" in said


@pytest.mark.parametrize(
    ("url", "trusts"),
    [
        ("http://127.0.0.1:8000", False),
        ("http://127.1.2.3", False),
        ("http://localhost:8000/v1", False),
        ("http://LOCALHOST", False),
        ("http://[::1]:8000", False),
        ("http://0.0.0.0:8000", False),
        ("https://example.org/v1", True),
        ("http://10.0.0.5:8000", True),
        ("http://localhost.example.org:8000", True),
    ],
)
def test_the_environments_proxies_are_used_for_other_machines_alone(url: str, trusts: bool) -> None:
    assert http_settings(url) == {"trust_env": trusts}


def test_a_server_on_loopback_is_asked_without_the_environments_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"stage": "ready"}')

        def log_message(self, *_: object) -> None: ...

    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        with ApiClient(f"http://127.0.0.1:{http.server_address[1]}") as client:
            assert client.stage() == "ready"
        http.shutdown()
