from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rayllm.executor.channel import SocketDir, listen_unix
from rayllm.machine.death_watch import remove_dead_sockets
from rayllm.machine.processes import Process, descendants

SERVER = """
import subprocess, sys, time
from rayllm.machine.death_watch import cleared_up_after_death

with cleared_up_after_death(sys.argv[1]):
    child = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True); input()"
    started = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    started.stdout.readline()
    print("up", flush=True)
    input()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray"


@pytest.fixture
def server(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", SERVER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        yield process
        process.kill()


def test_a_killed_server_leaves_no_process_and_no_folder(server: subprocess.Popen[bytes], folder: Path) -> None:
    started = _started_by(server)
    time.sleep(1.5)  # the watch has looked once
    os.kill(server.pid, signal.SIGKILL)

    assert _until(lambda: not folder.exists())
    assert _until(lambda: not any(process.is_alive() for process in started))


def test_a_second_interrupt_leaves_no_folder_either(folder: Path) -> None:
    program = """
import subprocess, sys, time
from rayllm.cli.terminal import interrupted_by_signals
from rayllm.machine.death_watch import cleared_up_after_death

with interrupted_by_signals(), cleared_up_after_death(sys.argv[1]):
    started = subprocess.Popen(["sleep", "600"])
    try:
        print("up", flush=True)
        input()
    finally:
        print("stopping", flush=True)
        time.sleep(600)
"""
    command = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        started = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"stopping\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 128 + signal.SIGINT

    assert _until(lambda: not folder.exists())
    assert _until(lambda: not any(each.is_alive() for each in started))


def test_sockets_that_nobody_listens_on_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    living, dead = SocketDir(), SocketDir()
    with contextlib.closing(listen_unix(living.path)):
        listen_unix(dead.path).close()
        remove_dead_sockets()
        assert Path(living.path).exists()
        assert not Path(dead.path).parent.exists()
    living.close()


def test_a_server_that_stops_in_order_is_left_alone(server: subprocess.Popen[bytes], folder: Path) -> None:
    started = _started_by(server)
    [sleeper] = [process for process in started if process.command() == "sleep"]
    assert server.stdin is not None
    server.stdin.write(b"\n")
    server.stdin.close()
    server.wait(10)

    assert folder.exists()
    assert _until(lambda: not [p for p in started if p.is_alive() and p != sleeper])  # the child's input has ended
    assert sleeper.is_alive()
    sleeper.send(signal.SIGKILL)


def _started_by(server: subprocess.Popen[bytes]) -> set[Process]:
    found = descendants(server.pid)
    assert len(found) == 3, "the watch, a child and its sleep"
    return found


def _until(condition: Callable[[], bool], timeout_s: float = 15.0) -> bool:
    end_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.02)
    return condition()
