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
from rayllm.machine.orphan_cleanup import remove_dead_sockets
from rayllm.machine.processes import Process, descendants, processes_of

PROGRAM = """
import os, subprocess, sys
from pathlib import Path
from rayllm.machine.orphan_cleanup import cleanup_if_killed

folder = Path(sys.argv[1])
with cleanup_if_killed(str(folder)):
    child = [sys.executable, "-c", "import subprocess; subprocess.Popen(['sleep', '600'], stdout=-3, stderr=-3).wait()"]
    with (folder / "raylet.out").open("wb") as output:
        ray = subprocess.Popen(child, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True)
    own = subprocess.Popen(["sleep", "601"], stdout=subprocess.DEVNULL)
    print("up", flush=True)
    exec(sys.stdin.readline())
"""
"""Starts what stands for a Ray, whose output goes into its folder, with a child whose does not, and something of its
own."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray"


@pytest.fixture
def program(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert _until(lambda: len(processes_of(str(folder))) == 2)
        everything = descendants(process.pid)
        assert len(everything) == 4, "the watch, the Ray and its child, and the program's own"
        yield process
        process.kill()
        for each in everything:
            each.send(signal.SIGKILL)


def _tell(program: subprocess.Popen[bytes], statement: str) -> None:
    assert program.stdin is not None
    program.stdin.write(statement.encode() + b"\n")
    program.stdin.flush()


@pytest.mark.parametrize(
    "end",
    [
        "os.kill(os.getpid(), 9)",
        "os._exit(3)",
        "os.kill(os.getpid(), 11)",
        "os.abort()",
        "raise KeyboardInterrupt",
        "os.closerange(3, 99); os._exit(3)",
    ],
)
def test_however_a_program_ends_nothing_of_its_ray_is_left(
    end: str, program: subprocess.Popen[bytes], folder: Path
) -> None:
    rays = processes_of(str(folder))
    others = descendants(program.pid) - rays
    _tell(program, end)
    program.wait(10)

    assert _until(lambda: not folder.exists())
    assert not [each for each in rays if each.is_alive()]
    assert _until(lambda: [each.command() for each in others if each.is_alive()] == ["sleep"]), (
        "the program's own stays"
    )


def test_a_child_that_holds_the_pipe_open_keeps_nothing_alive(program: subprocess.Popen[bytes], folder: Path) -> None:
    _tell(program, "import time; child = os.fork() or time.sleep(600); print(child, flush=True); os._exit(3)")
    assert program.stdout is not None
    child = int(program.stdout.readline())
    try:
        assert _until(lambda: not folder.exists())
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_program_that_removes_the_folder_itself_is_left_alone(program: subprocess.Popen[bytes], folder: Path) -> None:
    rays = processes_of(str(folder))
    watch = next(each for each in descendants(program.pid) if "orphan_cleanup" in each.command_line())
    _tell(program, "import shutil; shutil.rmtree(folder)")
    program.wait(10)

    assert not watch.is_alive()
    assert all(each.is_alive() for each in rays)


def test_a_program_that_closes_the_pipe_and_lives_keeps_its_ray(program: subprocess.Popen[bytes], folder: Path) -> None:
    _tell(program, "os.closerange(3, 99); print('closed', flush=True); exec(sys.stdin.readline())")
    assert program.stdout is not None
    assert program.stdout.readline() == b"closed\n"
    time.sleep(0.5)
    assert len(processes_of(str(folder))) == 2


def test_a_second_interrupt_leaves_no_folder_either(folder: Path) -> None:
    program = """
import subprocess, sys, time
from pathlib import Path
from rayllm.cli.terminal import interrupted_by_signals
from rayllm.machine.orphan_cleanup import cleanup_if_killed

with interrupted_by_signals(), cleanup_if_killed(sys.argv[1]):
    output = (Path(sys.argv[1]) / "raylet.out").open("wb")
    started = subprocess.Popen(["sleep", "600"], stdout=output)
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


def test_it_runs_from_any_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "select.py").write_text("raise RuntimeError('not the real one')")
    (tmp_path / "rayllm").mkdir()
    program = """
import os, subprocess, sys
from rayllm.machine.orphan_cleanup import cleanup_if_killed

os.chdir(sys.argv[2])
with cleanup_if_killed(sys.argv[1]):
    subprocess.Popen(["sleep", "600"], stdout=open(sys.argv[1] + "/raylet.out", "wb"))
    os._exit(1)
"""
    subprocess.run([sys.executable, "-c", program, str(folder), str(tmp_path)], check=False)
    assert _until(lambda: not folder.exists())


def test_sockets_that_nobody_listens_on_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    living, dead = SocketDir(), SocketDir()
    with contextlib.closing(listen_unix(living.path)):
        listen_unix(dead.path).close()
        remove_dead_sockets()
        assert Path(living.path).exists()
        assert not Path(dead.path).parent.exists()
    living.close()


def test_a_process_is_known_by_where_its_output_goes(folder: Path, tmp_path: Path) -> None:
    def started(path: Path, *command: str) -> subprocess.Popen[bytes]:
        with path.open("wb") as output:
            return subprocess.Popen(command or ("sleep", "600"), stdout=output, stderr=output)

    (tmp_path / "ray-too").mkdir()
    rays = started(folder / "out")
    others = [started(tmp_path / "ray-too" / "out"), started(tmp_path / "log", "tail", "-f", str(folder / "out"))]
    try:
        assert {each.pid for each in processes_of(str(folder))} == {rays.pid}
        assert Process(rays.pid, 1) not in processes_of(str(folder))
    finally:
        for each in (rays, *others):
            each.kill()
            each.wait()


def _until(condition: Callable[[], bool], timeout_s: float = 15.0) -> bool:
    end_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.02)
    return condition()
