"""ps, status, logs and stop, on processes that list themselves as servers do."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rayllm.cli.main import main
from rayllm.cli.stop import NotStoppedError
from rayllm.cli.stop import run as stop
from rayllm.errors import ConfigError, EngineUnreachableError
from rayllm.machine import registry

SERVER = """
import pathlib, signal, sys, time
from rayllm.machine.registry import listed
def term(number, frame):
    if "deaf" in sys.argv: return
    raise SystemExit(0)
signal.signal(signal.SIGTERM, term)
log = pathlib.Path(sys.argv[2])
log.write_text("one\\ntwo\\nthree\\n")
with listed("serve", name=sys.argv[1], model="m", url=sys.argv[3], log=log, shutdown_timeout_s=0.0):
    print("listed", flush=True)
    while True: time.sleep(0.05)
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("RLLM_LOG_DIR", str(tmp_path / "logs"))
    return tmp_path / "rayllm"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started = []

    def start_one(name: str, *words: str, url: str = "http://127.0.0.1:1") -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", SERVER, name, str(tmp_path / f"{name}.log"), url, *words]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "listed\n"
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_ps_lists_a_server_with_what_finds_it(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    server = start("first")
    assert main(["ps", "--json"]) == 0
    [entry] = json.loads(capsys.readouterr().out)
    assert (entry["name"], entry["pid"], entry["state"]) == ("first", server.pid, "not reachable")
    for word in ("first", str(server.pid), "m", "http://127.0.0.1:1", None):
        assert registry.find(word).pid == server.pid
    main(["ps"])
    assert capsys.readouterr().out.splitlines()[0].split() == ["NAME", "PID", "MODEL", "URL", "UP", "STATE"]


def test_a_killed_server_leaves_no_lie(start: Start, runtime: Path) -> None:
    server = start("first")
    server.kill()
    server.wait()
    assert len(list(runtime.iterdir())) == 1
    assert registry.running() == []
    assert list(runtime.iterdir()) == []


def test_a_pid_used_again_is_not_taken_for_the_server(start: Start, runtime: Path) -> None:
    start("first")
    [file] = runtime.iterdir()
    entry = json.loads(file.read_text())
    file.write_text(json.dumps({**entry, "started": entry["started"] - 1}))
    assert registry.running() == []


def test_a_pid_of_before_the_boot_is_not_taken_for_the_server(start: Start, runtime: Path) -> None:
    start("first")
    [file] = runtime.iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "boot": "another"}))
    assert registry.running() == []


def test_entries_are_for_their_user_alone(start: Start, runtime: Path) -> None:
    start("first")
    [file] = runtime.iterdir()
    assert (runtime.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)


def test_a_runtime_folder_of_somebody_elses_making_is_not_used(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    runtime.symlink_to(tmp_path / "elsewhere")
    assert registry.runtime_folder().name == f"rayllm-{os.getuid()}"
    monkeypatch.setattr(registry, "_fault_of", lambda folder: "is not a folder that you own")
    with pytest.raises(
        ConfigError, match=r"rayllm' is not a folder that you own; '/tmp/rayllm-\d+' is not .*XDG_RUNTIME_DIR"
    ):
        registry.running()


def test_stop_ends_a_server_and_unlists_it(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    server = start("first")
    reaper = threading.Thread(target=server.wait)
    reaper.start()
    assert main(["stop", "first"]) == 0
    reaper.join()
    assert server.returncode == 0
    assert "stopped first" in capsys.readouterr().out
    assert registry.running() == []


def test_stop_asks_which_where_two_run_and_all_ends_both(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    servers = start("first"), start("second")
    assert main(["stop"]) == 2
    error = capsys.readouterr().err
    assert all(str(server.pid) in error for server in servers)
    assert main(["stop", "secnd"]) == 3
    assert "did you mean 'second'?" in capsys.readouterr().err
    assert main(["stop", "--all"]) == 0
    assert [server.wait() for server in servers] == [0, 0]


def test_stop_says_when_a_server_does_not_end_in_time(start: Start) -> None:
    start("first", "deaf")
    with pytest.raises(NotStoppedError, match="--force"):
        stop(["--timeout", "0.1"])


def test_nothing_to_stop_exits_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stop"]) == 3
    assert "rayllm serve" in capsys.readouterr().err
    with pytest.raises(EngineUnreachableError):
        registry.find(None)


def test_logs_prints_the_last_lines(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    start("first")
    assert main(["logs", "-n", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "two\nthree\n"
    assert captured.err.startswith("==> ")
    assert main(["logs", "first", "-n", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lines"] == ["one", "two", "three"]


def test_logs_follows_until_the_server_ends(start: Start, tmp_path: Path) -> None:
    server = start("first")
    follower = subprocess.Popen(
        [sys.executable, "-m", "rayllm", "logs", "-f"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert follower.stdout is not None
    with follower.stdout as out:
        assert [out.readline() for _ in range(3)] == ["one\n", "two\n", "three\n"]
        with (tmp_path / "first.log").open("a") as log:
            log.write("four\n")
        assert out.readline() == "four\n"
        os.kill(server.pid, signal.SIGTERM)
        server.wait()
        assert out.read() == ""
    assert follower.wait(timeout=10) == 0


def test_logs_without_a_server_prints_the_newest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs"]) == 3
    folder = tmp_path / "logs"
    folder.mkdir()
    for age, name in enumerate(("new", "old")):
        (folder / f"{name}.log").write_text(f"{name}\n")
        os.utime(folder / f"{name}.log", (time.time() - age, time.time() - age))
    assert main(["logs"]) == 0
    assert capsys.readouterr().out == "new\n"


# ---------------------------------------------------------------------------------------------------------- status


class _Server(BaseHTTPRequestHandler):
    """A server's own words about itself; each look at its metrics finds ten tokens more."""

    tokens = 0
    healthy = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        kind = type(self)
        kind.tokens += 10 * (self.path == "/metrics")
        pages = {
            "/health": json.dumps({"stage": "ready" if kind.healthy else "loading weights"}),
            "/v1/models": json.dumps({"data": [{"id": "m"}]}),
            "/metrics": "vllm:num_requests_running{model_name='m'} 3\n".replace("'", '"')
            + f"vllm:kv_cache_usage_perc 0.25\nvllm:generation_tokens_total {kind.tokens}\n",
            "/dashboard/state": json.dumps(
                {"processes": [{"role": "worker", "rank": 0, "pid": 7, "host": "h", "devices": ["cpu"]}]}
            ),
        }
        text = pages.get(self.path, "{}")
        status = 404 if self.path not in pages else 503 if self.path == "/health" and not kind.healthy else 200
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def served() -> Iterator[tuple[type[_Server], str]]:
    handler = type("_OneServer", (_Server,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield handler, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_status_tells_load_pace_and_ranks(
    served: tuple[type[_Server], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", served[1], "--json", "--interval", "0.1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["stage"], found["model"], found["num_running"], found["kv_cache_usage"]) == ("ready", "m", 3, 0.25)
    assert 50 < found["generation_tokens_per_second"] <= 100
    assert found["processes"][0]["rank"] == 0
    assert main(["status", served[1], "--interval", "0"]) == 0
    text = capsys.readouterr().out
    assert "25.0% in use" in text
    assert "pid 7 at h on cpu" in text


def test_status_of_a_server_that_is_not_ready_exits_1(
    served: tuple[type[_Server], str], capsys: pytest.CaptureFixture[str]
) -> None:
    served[0].healthy = False
    assert main(["status", served[1]]) == 1
    assert "loading weights" in capsys.readouterr().out


def test_which_of_several_servers_is_meant_must_be_said(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    start("one")
    start("two", url="http://127.0.0.1:2")
    assert main(["status"]) == 2
    said = capsys.readouterr().err
    assert "2 servers are running, name one of them: " in said
    assert "http://127.0.0.1:2" in said


def test_status_finds_the_server_that_runs_here(
    start: Start, served: tuple[type[_Server], str], capsys: pytest.CaptureFixture[str]
) -> None:
    start("first", url=served[1])
    assert main(["status", "--json", "--interval", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["url"] == served[1]
