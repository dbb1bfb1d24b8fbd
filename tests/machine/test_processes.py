import os
import signal
import subprocess
import sys
import time

from rayllm.machine.processes import Process, descendants, end_all

_TREE = (
    "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    "print(child.pid, flush=True); time.sleep(60)"
)


def _start_tree() -> tuple["subprocess.Popen[str]", int]:
    process = subprocess.Popen([sys.executable, "-c", _TREE], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    grandchild = int(process.stdout.readline())
    process.stdout.close()
    return process, grandchild


def test_children_and_grandchildren_are_found_and_ended() -> None:
    process, grandchild = _start_tree()
    found = {each for each in descendants() if each.pid in (process.pid, grandchild)}
    assert {each.pid for each in found} == {process.pid, grandchild}
    assert descendants(process.pid) == {each for each in found if each.pid == grandchild}
    assert end_all(found, grace_s=0) == found
    assert not any(each.is_alive() for each in found)
    process.wait()


def test_processes_that_end_by_themselves_are_not_killed() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.2)"])
    found = {each for each in descendants() if each.pid == process.pid}
    assert end_all(found, grace_s=30) == set()
    assert process.wait() == 0


def test_a_number_used_again_is_another_process() -> None:
    me = next(each for each in descendants(os.getppid()) if each.pid == os.getpid())
    assert me.is_alive()
    other = Process(me.pid, me.started + 1)
    assert not other.is_alive()
    other.send(signal.SIGKILL)
    time.sleep(0)  # still here
