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
from rayllm.machine.orphan_cleanup import clear, remove_dead_sockets
from rayllm.machine.processes import Process, descendants, process_of, processes_of

PROGRAM = """
import os, subprocess, sys
from pathlib import Path
from rayllm.machine.orphan_cleanup import ray_folder

folder = Path(sys.argv[1])
with ray_folder(str(folder)) as ray:
    ray.is_up = True
    child = [sys.executable, "-c", "import subprocess; subprocess.Popen(['sleep', '600'], stdout=-3, stderr=-3).wait()"]
    with (folder / "raylet.out").open("wb") as output:
        started = subprocess.Popen(child, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True)
    own = subprocess.Popen(["sleep", "601"], stdout=subprocess.DEVNULL)
    print("up", flush=True)
    exec(sys.stdin.readline())
"""
"""Starts what stands for a Ray, whose output goes into its folder, with a child whose does not, and something of its
own."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
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
from rayllm.machine.orphan_cleanup import ray_folder

with interrupted_by_signals(), ray_folder(sys.argv[1]):
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
from rayllm.machine.orphan_cleanup import ray_folder

os.chdir(sys.argv[2])
with ray_folder(sys.argv[1]):
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
    folder.mkdir()

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


def _orphan(*command: str) -> None:
    """Starts a process whose parent is gone, with its output in a pipe that nobody reads."""
    parent = "import subprocess, sys; subprocess.Popen(sys.argv[1:], stdout=-1, stderr=-1, start_new_session=True)"
    subprocess.run([sys.executable, "-c", parent, *command], check=True, timeout=30)


LATE_WRITER = """
import os, sys, time

end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    os.makedirs(sys.argv[2] + "/session/logs", exist_ok=True)
    open(f"{sys.argv[2]}/session/logs/{time.monotonic()}", "w").close()
    time.sleep(0.01)
time.sleep(float(sys.argv[3]))
"""
"""Makes the folder again and writes there for so many seconds, then lives for so many more."""


@pytest.mark.parametrize("option", ["--temp-dir=", "--session-dir=", "--log-dir=", "--log_dir="])
def test_an_agent_without_parent_title_and_output_is_known_by_its_arguments(option: str, folder: Path) -> None:
    below = "" if option == "--temp-dir=" else "/session_1/logs"
    _orphan("sh", "-c", "sleep 600; true", "agent.py", f"{option}{folder}{below}")
    try:
        assert len(processes_of(str(folder))) == 2, "the agent and its child"
        assert not processes_of(f"{folder}-too")
        assert not processes_of(str(folder)[:-1])
    finally:
        assert clear(str(folder))
    assert not processes_of(str(folder))


def test_what_an_agent_writes_late_goes_with_it(folder: Path) -> None:
    folder.mkdir()
    _orphan(sys.executable, "-c", LATE_WRITER, "600", str(folder), "600", f"--log-dir={folder}/session/logs")
    assert _until((folder / "session").exists)
    assert clear(str(folder))
    assert not folder.exists()
    time.sleep(0.3)
    assert not folder.exists(), "who wrote there is gone"


def test_a_folder_into_which_an_unknown_process_still_writes_goes_once_that_stops(folder: Path) -> None:
    folder.mkdir()
    _orphan(sys.executable, "-c", LATE_WRITER, "0.8", str(folder), "0")
    assert _until((folder / "session").exists)
    assert clear(str(folder), settle_s=0.5)
    assert not folder.exists()
    time.sleep(0.5)
    assert not folder.exists()


def test_a_folder_that_does_not_stay_away_is_reported_in_time(folder: Path) -> None:
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", LATE_WRITER, "600", str(folder), "0"], stdout=-1) as writer:
        assert _until((folder / "session").exists)
        assert not clear(str(folder), settle_s=600, timeout_s=-599)
        writer.kill()
    assert clear(str(folder), settle_s=0.2)
    assert not folder.exists()


EARLY_INTERRUPTS = """
import os, sys
from rayllm.machine import orphan_cleanup

def interrupt_at(number):
    left = number
    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename == orphan_cleanup.__file__ and event in ("line", "return"):
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace
    return trace

children = []
for number in range(int(sys.argv[2])):
    child = os.fork()
    if not child:
        reached = False
        try:
            sys.settrace(interrupt_at(number))
            with orphan_cleanup.ray_folder(f"{sys.argv[1]}-{number}"):
                sys.settrace(None)
                reached = True
        finally:
            os._exit(reached)
    children.append(child)
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""
"""An interrupt at each of so many points in the start of the block, each in a process of its own."""


def test_an_interrupt_anywhere_in_the_start_leaves_neither_folder_nor_process(folder: Path) -> None:
    command = [sys.executable, "-c", EARLY_INTERRUPTS, str(folder), "32"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    codes = done.stdout.split()
    assert codes[0] == "0", "the first is interrupted"
    assert codes[-1] == "1", "the last comes through"
    assert _until(lambda: not list(folder.parent.glob("ray-*")))
    assert _until(lambda: not _watches_of(folder))


def _watches_of(folder: Path) -> list[Process]:
    return [each for each in map(process_of, _pids()) if each is not None and f"{folder}-" in each.command_line()]


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


@pytest.mark.parametrize("is_up", [False, True])
def test_what_starts_late_in_an_interrupted_start_leaves_no_folder(is_up: bool, folder: Path) -> None:
    program = f"""
import subprocess, sys
from rayllm.machine.orphan_cleanup import clear, ray_folder

with ray_folder(sys.argv[1]) as ray:
    late = "import os, sys, time; time.sleep(0.4); os.makedirs(sys.argv[1] + '/session/logs')"
    subprocess.Popen([sys.executable, "-c", late, sys.argv[1]], stdout=-1)
    ray.is_up = {is_up}
    try:
        raise KeyboardInterrupt
    finally:
        if not ray.is_up:
            clear(sys.argv[1])
"""
    subprocess.run([sys.executable, "-c", program, str(folder)], stderr=subprocess.DEVNULL, check=False, timeout=30)
    time.sleep(0.6)  # it has written by now
    assert _until(lambda: not folder.exists())


def test_a_start_that_fails_leaves_nothing_while_its_program_lives_on(folder: Path) -> None:
    program = """
import sys
from rayllm.machine.orphan_cleanup import ray_folder

try:
    with ray_folder(sys.argv[1]):
        raise RuntimeError
except RuntimeError:
    print("failed", flush=True)
input()
"""
    command = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"failed\n"
        assert not folder.exists()
        assert not descendants(process.pid)
        process.communicate(b"\n", timeout=30)


def _until(condition: Callable[[], bool], timeout_s: float = 15.0) -> bool:
    end_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.02)
    return condition()
