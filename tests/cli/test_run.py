"""`rayllm run`: which server it talks to, what it asks, and what stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cli.on_terminal import OnTerminal

from rayllm.cli import background
from rayllm.cli.flags import UsageError
from rayllm.cli.main import main
from rayllm.errors import EngineError
from rayllm.machine import registry

LISTED = """
import pathlib, sys, time
from rayllm.machine.registry import listed
log = pathlib.Path(sys.argv[3])
with listed("serve", name=sys.argv[1], model=sys.argv[1], url=sys.argv[2], log=log, shutdown_timeout_s=0.0):
    print("listed", flush=True)
    while True: time.sleep(0.05)
"""


class _Server(BaseHTTPRequestHandler):
    """Answers a chat with what it was asked, under its own name."""

    asked: list[dict[str, Any]] = []

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        found = {"stage": "ready"} if self.path == "/health" else {"data": [{"id": "m", "max_model_len": 99}]}
        self._send("application/json", json.dumps(found))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        _Server.asked.append(body)
        text = f"**{body['model']}** heard {body['messages'][-1]['content']}"
        event = {"choices": [{"delta": {"content": text}}], "usage": {"completion_tokens": 1, "total_tokens": 1}}
        self._send("text/event-stream", f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n")

    def _send(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("RLLM_LOG_DIR", str(tmp_path / "logs"))
    monkeypatch.setenv("HOME", str(tmp_path))
    _Server.asked.clear()


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def listed(tmp_path: Path, url: str) -> Iterator[Any]:
    """Makes a process that is listed as a server of that name, at the fake one's address."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str) -> int:
        argv = [sys.executable, "-c", LISTED, name, url, str(tmp_path / "log")]
        started.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == "listed\n"
        return started[-1].pid

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def rayllm(*argv: str, stdin: str | None = None, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    given: dict[str, Any] = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    command = [sys.executable, "-m", "rayllm", "run", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, **given)


def test_one_question_to_a_server_that_runs(listed: Any) -> None:
    listed("first")
    done = rayllm("first", "What is", "--temperature", "0", "this?", "--system", "be brief")
    assert (done.returncode, done.stdout, done.stderr) == (0, "**first** heard What is this?\n", "")
    [body] = _Server.asked
    assert (body["temperature"], body["messages"][0]["content"]) == (0.0, "be brief")


def test_standard_input_is_the_question_or_comes_before_it(listed: Any) -> None:
    listed("first")
    assert rayllm("first", stdin="two\nlines\n").stdout == "**first** heard two\nlines\n"
    assert rayllm("first", "Sum up.", stdin="text\n").stdout == "**first** heard text\n\nSum up.\n"
    assert rayllm("first", "No input.").stdout == "**first** heard No input.\n"
    empty = rayllm("first", stdin="\n")
    assert (empty.returncode, empty.stdout) == (2, "")
    assert "give a PROMPT" in empty.stderr


def test_without_a_model_it_is_the_only_server(listed: Any) -> None:
    listed("first")
    assert rayllm(stdin="hi").stdout == "**first** heard hi\n"
    listed("second")
    several = rayllm(stdin="hi")
    assert several.returncode == 2
    assert "2 servers are running, name the MODEL of one of them: first (http" in several.stderr
    assert rayllm("second", "hi").stdout == "**second** heard hi\n"


def test_a_models_own_name_finds_its_server(listed: Any, tmp_path: Path) -> None:
    listed("owner/model")
    listed("folder")
    (tmp_path / "folder").mkdir()
    assert rayllm("ms:owner/model", "hi").stdout == "**owner/model** heard hi\n"
    assert rayllm(str(tmp_path / "folder"), "hi").stdout == "**folder** heard hi\n"


def test_settings_of_a_server_that_runs_already_are_refused(listed: Any) -> None:
    pid = listed("first")
    done = rayllm("first", "hi", "--max-model-len", "100")
    assert done.returncode == 2
    assert "--max-model-len is of a server to start, and first is served already at http" in done.stderr
    assert f"rayllm stop {pid}" in done.stderr


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["absent/folder/deep", "hi"], 2, "absent/folder/deep"),
        (["--temperature", "-1", "x", "hi"], 2, "temperature=-1.0 is outside"),
        (["--tempratur", "1"], 2, "did you mean '--temperature'"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_starts(argv: list[str], code: int, said: str) -> None:
    done = rayllm(*argv)
    assert done.returncode == code
    assert said in done.stderr
    assert registry.running() == []


def test_a_conversation_on_a_terminal(listed: Any, tmp_path: Path) -> None:
    listed("first")
    with OnTerminal(["-m", "rayllm", "run", "first"]) as terminal:
        terminal.read_until("> ")
        terminal.send("hello\n")
        terminal.read_until("first heard hello\n")
        terminal.send("/exit\n")
        shown = terminal.read_all()
    assert terminal.process.returncode == 0
    assert "stays" not in shown  # this command did not start it


def test_a_server_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "serve.out"
    output.write_text("starting Ray ...\nrayllm serve: there is no room\n")
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"]) as process:
        process.wait()
        with pytest.raises(EngineError, match="the server did not start: there is no room"):
            background._listed(process, None, output)  # type: ignore[arg-type]


def test_a_server_that_ends_before_it_is_ready_is_not_waited_for(listed: Any, tmp_path: Path) -> None:
    pid = listed("first")
    [entry] = registry.running()
    os.kill(pid, 9)
    while entry.is_alive():
        time.sleep(0.01)
    gone = registry.Entry(**{**vars(entry), "url": "http://127.0.0.1:1"})
    with pytest.raises(EngineError, match=f"pid {pid}\\) ended"):
        background._await_ready(gone, None)


def test_two_servers_of_other_names_and_no_model_is_refused_in_this_process(listed: Any) -> None:
    listed("first"), listed("second")
    with pytest.raises(UsageError, match="2 servers are running"):
        background.find_or_start(None, {}, 0)
    assert main(["run", "x", "--port", "no"]) == 2


@pytest.mark.live
@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_a_model_is_served_in_the_background_and_stays() -> None:
    try:
        first = rayllm("--port", "0", "--temperature", "0", stdin="What is RayLLM?", timeout_s=150)
        assert first.returncode == 0, first.stderr
        assert "inference engine" in first.stdout
        [entry] = registry.running()
        assert f"is still served at {entry.url}; rayllm stop {entry.pid} stops it" in first.stderr
        again = rayllm(entry.model, "--temperature", "0", "What is RayLLM?")
        assert again.stdout == first.stdout
        assert again.stderr == ""
    finally:
        assert main(["stop", "--all"]) == 0
    assert registry.running() == []
