"""Ray's own processes, killed and stopped under a real server and under programs: all who wait are told within seconds,
and nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served_process import ServedProcess, running_serve
from tiny import make_checkpoint

from rayllm.machine.processes import Process, descendants
from rayllm.machine.registry import running

pytestmark = [pytest.mark.cluster, pytest.mark.live, pytest.mark.timeout(300)]

TOLD_S, ENDED_S = 3.0, 10.0
SLACK_S = 2.0
"""Of a machine that has other work."""
CLEANUP_S = 5.0
"""What the cleanup process may take after a program that ended without a word."""
LONG: dict[str, Any] = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 16_000, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=16_384))


def _below(root: int, command: str) -> Process:
    """The only process below `root` of that name, or whose command line begins so."""
    [found] = [p for p in descendants(root) if p.command() == command or p.command_line().startswith(command)]
    return found


def _folder_of(raylet: Process) -> Path:
    """The temporary folder of its Ray."""
    words = raylet.command_line().split()
    return Path(next(word for word in words if word.startswith("--temp-dir=")).partition("=")[2])


def _left(processes: set[Process]) -> list[str]:
    return [each.command_line()[:80] for each in processes if each.is_alive()]


def _until(condition: Callable[[], bool], timeout_s: float) -> bool:
    end_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.02)
    return condition()


# --------------------------------------------------------------------------------------------------------- servers


class _Client(threading.Thread):
    """A request that is open when Ray dies."""

    def __init__(self, served: ServedProcess, stream: bool):
        super().__init__(daemon=True)
        self._served, self._stream = served, stream
        self.status, self.events, self.ended_s = 0, list[str](), float("inf")

    def run(self) -> None:
        body = {**LONG, "stream": self._stream}
        with self._served.client.stream("POST", "/v1/completions", json=body) as response:
            self.status = response.status_code
            self.events = [line for line in response.iter_lines() if line]
            self.ended_s = time.monotonic()

    @property
    def error(self) -> dict[str, Any]:
        """The last thing that was said, before a stream's own end."""
        said = [event.removeprefix("data: ") for event in self.events if event != "data: [DONE]"]
        error: dict[str, Any] = json.loads(said[-1])["error"]
        return error


@pytest.mark.parametrize(
    ("victim", "sign", "terminates"),
    [
        ("raylet", signal.SIGKILL, False),
        ("gcs_server", signal.SIGKILL, False),
        ("raylet", signal.SIGSTOP, True),
        ("gcs_server", signal.SIGSTOP, False),
    ],
)
def test_a_server_whose_ray_dies_tells_its_clients_and_ends(
    victim: str, sign: signal.Signals, terminates: bool, model: str
) -> None:
    with running_serve(model, "--served-model-name", "tiny", "--tensor-parallel-size", "2") as served:
        family = descendants(served.process.pid)
        folder = _folder_of(_below(served.process.pid, "raylet"))
        clients = [_Client(served, stream=True), _Client(served, stream=True), _Client(served, stream=False)]
        for client in clients:
            client.start()
        time.sleep(2)
        dead = _below(served.process.pid, victim)
        began_s = time.monotonic()
        dead.send(sign)
        if terminates:
            served.process.terminate()
        health = _health_until_gone(served) if not terminates else []
        code = served.process.wait(60)
        ended_s = time.monotonic() - began_s

        for client in clients:
            client.join(10)
        told_s = max(client.ended_s for client in clients) - began_s
        print(f"{sign.name} of {victim}: clients told after {told_s:.2f} s, ended after {ended_s:.2f} s")
        assert told_s < TOLD_S + SLACK_S
        assert ended_s < ENDED_S + SLACK_S
        # A call that is on its way to the raylet when that dies makes Ray's own library end the process at once, with
        # code 1 and without a word ("Exiting because the Raylet IPC connection failed"); the cleanup process does the
        # rest, which takes it some seconds more.
        is_ended_by_ray = victim == "raylet" and code == 1 and not served.errors.read_text()
        cleanup_s = CLEANUP_S if is_ended_by_ray else 0
        assert _until(lambda: not _left(family) and not folder.exists(), cleanup_s + SLACK_S), _left(family)
        assert served.process.pid not in [entry.pid for entry in running()]
        if not terminates:
            assert [client.status for client in clients] == [200, 200, 503]
            for client in clients:
                assert (client.error["code"], victim in client.error["message"]) == ("ray_died", True), client.error
            assert [status for status in health if status != 200] == [503], "it says so before it is gone"
            assert code == 1
            if is_ended_by_ray:
                return
            [line] = served.errors.read_text().splitlines()
            assert line.startswith(f"rayllm serve: Ray's {victim} (pid "), line


def _health_until_gone(served: ServedProcess) -> list[int]:
    """The statuses that `/health` had, each once, until nobody answered."""
    seen: list[int] = []
    while served.process.poll() is None:
        try:
            status = httpx.get(f"{served.url}/health", timeout=2, trust_env=False).status_code
        except httpx.HTTPError:
            break
        if not seen or seen[-1] != status:
            seen.append(status)
        time.sleep(0.02)
    return seen


def test_what_ray_can_do_without_costs_a_server_nothing(model: str) -> None:
    """Its log monitor, autoscaler and API server are needed by nobody; Serve's controller is started again. (HAProxy's
    manager takes HAProxy with it, and so the connections that are open.)"""
    short = {**LONG, "max_tokens": 300, "temperature": 0}
    with running_serve(model, "--served-model-name", "tiny") as served:
        expected = served.client.post("/v1/completions", json=short).json()["choices"][0]["text"]
        for name in ("log_monitor.py", "monitor.py", "dashboard.py", "ray::ServeController"):
            family = descendants(served.process.pid)
            victims = [each for each in family if _is(each, name)]
            assert len(victims) == 1, (name, [each.command_line()[:200] for each in family])
            [victim] = victims
            answers = list[str]()
            client = threading.Thread(
                target=lambda: answers.append(served.client.post("/v1/completions", json=short).text)  # noqa: B023
            )
            client.start()
            victim.send(signal.SIGKILL)
            client.join(60)
            assert json.loads(answers[0])["choices"][0]["text"] == expected, (name, answers)
            assert _until(lambda: served.client.get("/health").status_code == 200, 30), name
            assert served.process.poll() is None, served.log_text()


def _is(process: Process, name: str) -> bool:
    words = process.command_line().split()
    return any(word == name or word.startswith(f"{name}.") or word.endswith(f"/{name}") for word in words)


# -------------------------------------------------------------------------------------------------------- programs

LLM = """
import os, signal, sys, threading, time
from rayllm import LLM, SamplingParams

def say(word):
    print(word, flush=True)

if __name__ == "__main__":
    long = SamplingParams(max_tokens=16000, ignore_eos=True)
    llm = LLM(sys.argv[1], tensor_parallel_size=2)
    say("ready")
    exec(sys.argv[2])
"""
GENERATES = """
try:
    llm.generate("Once upon a time", long)
except Exception as error:
    say(f"{type(error).__name__} {error.code} {error}")
llm.close()
say("closed")
"""
ASYNC = """
import asyncio, sys
from rayllm import AsyncLLM, SamplingParams

async def main(llm):
    print("ready", flush=True)
    try:
        async for _ in llm.generate("Once upon a time", SamplingParams(max_tokens=16000, ignore_eos=True)):
            pass
    except Exception as error:
        print(f"{type(error).__name__} {error.code} {error}", flush=True)
    await llm.close()
    print("closed", flush=True)

if __name__ == "__main__":
    asyncio.run(main(AsyncLLM(sys.argv[1], tensor_parallel_size=2)))
"""


@pytest.fixture
def start(model: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a program with the model as its first argument, whose words are read from its standard output."""
    started: list[subprocess.Popen[str]] = []

    def start(program: str, *arguments: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [sys.executable, "-c", program, model, *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.communicate()


def _word(program: subprocess.Popen[str]) -> str:
    assert program.stdout is not None
    return program.stdout.readline().rstrip()


@pytest.mark.parametrize(
    ("program", "victim"), [(LLM, "raylet"), (LLM, "gcs_server"), (ASYNC, "raylet"), (ASYNC, "gcs_server")]
)
def test_a_program_whose_ray_dies_is_told_and_closes(
    program: str, victim: str, start: Callable[..., subprocess.Popen[str]]
) -> None:
    running = start(program, GENERATES)
    assert _word(running) == "ready"
    time.sleep(1.5)
    family = descendants(running.pid)
    folder = _folder_of(_below(running.pid, "raylet"))
    began_s = time.monotonic()
    _below(running.pid, victim).send(signal.SIGKILL)

    assert _word(running).startswith(f"EngineError ray_died Ray's {victim} (pid ")
    told_s = time.monotonic() - began_s
    assert _word(running) == "closed"
    closed_s = time.monotonic() - began_s
    assert running.wait(60) == 0
    ended_s = time.monotonic() - began_s
    print(f"{victim}: told after {told_s:.2f} s, closed after {closed_s:.2f} s, ended after {ended_s:.2f} s")
    assert told_s < TOLD_S
    assert closed_s < ENDED_S
    assert _until(lambda: not _left(family) and not folder.exists(), 5 + SLACK_S), _left(family)


@pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 11)"])
def test_a_program_that_ends_hard_leaves_nothing_5_s_later(
    end: str, start: Callable[..., subprocess.Popen[str]]
) -> None:
    _sockets_left()  # of others
    running = start(LLM, f"time.sleep(1); {end}")
    assert _word(running) == "ready"
    family = descendants(running.pid)
    folder = _folder_of(_below(running.pid, "raylet"))
    assert {"ray::DashboardA", "ray::DriverActo", "ray::WorkerActo"} <= {each.command() for each in family}
    running.wait(30)
    began_s = time.monotonic()
    assert _until(lambda: not _left(family) and not folder.exists(), 5 + SLACK_S), _left(family)
    print(f"{end}: nothing left after {time.monotonic() - began_s:.2f} s")
    assert not _sockets_left()


@pytest.mark.parametrize("after_s", [1.0, 3.0, 6.0, 9.0])
def test_a_program_that_is_interrupted_while_it_starts_leaves_nothing(
    after_s: float, start: Callable[..., subprocess.Popen[str]]
) -> None:
    others = _folders()
    running = start(LLM, "time.sleep(60)")  # a machine that starts it sooner interrupts the program itself
    time.sleep(after_s)
    family = descendants(running.pid)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert "KeyboardInterrupt" in said
    assert _until(lambda: not _left(family) and not _folders_of(running.pid, others), 5 + SLACK_S), (
        _left(family),
        _folders_of(running.pid, others),
    )


def _folders() -> set[Path]:
    return set(Path("/tmp").glob("rl-*"))


def _folders_of(pid: int, others: set[Path]) -> set[Path]:
    """New temporary folders in which a Ray of that process has a session, or none has one."""
    new = {folder: [path.name for path in folder.glob("session_2*")] for folder in _folders() - others}
    return {folder for folder, sessions in new.items() if not sessions or any(s.endswith(f"_{pid}") for s in sessions)}


def _sockets_left() -> list[str]:
    """Socket folders of this user's that nobody listens in."""
    from rayllm.machine.orphan_cleanup import SOCKET_FOLDERS, remove_dead_sockets

    before = set(Path(tempfile.gettempdir()).glob(SOCKET_FOLDERS))
    remove_dead_sockets()
    return [str(each) for each in before - set(Path(tempfile.gettempdir()).glob(SOCKET_FOLDERS))]
