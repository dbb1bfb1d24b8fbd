"""Ends a Ray of our own, and removes its folder, when the program that started it is killed: a small process beside
that program, which outlives it by a second.

It needs no Ray and imports nothing heavy, because it is there for the whole life of the program. A program that ends
in order says so through a pipe, and the process leaves everything alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rayllm.machine.processes import Process, end_all_of, this_process

SOCKET_FOLDERS = "rllm-*"
"""As `executor.channel.SocketDir` names them; that module is too heavy for here."""
_LOOK_PERIOD_S = 0.5
_END_POLL_S = 0.05
_GRACE_S = 0.5
_WATCH_END_S = 5.0
_IN_ORDER = b"."
_SOURCE_ROOT = str(Path(__file__).resolve().parents[2])


@contextlib.contextmanager
def cleanup_if_killed(folder: str) -> Iterator[None]:
    """For the length of the block: if this process is killed, the Ray whose temporary folder is `folder` ends, and the
    folder goes. Children that this process started otherwise are left alone. A block that has ended its Ray in order
    has removed the folder; where it has not, because it was interrupted, that is done when this process ends."""
    reader, writer = os.pipe()
    me = this_process()
    command = [sys.executable, "-m", __spec__.name, str(reader), str(me.pid), str(me.started), folder]
    path = os.pathsep.join(filter(None, (_SOURCE_ROOT, os.environ.get("PYTHONPATH"))))
    try:
        watch = subprocess.Popen(
            command,
            pass_fds=(reader,),
            start_new_session=True,  # a Ctrl-C is meant for the program
            stdin=subprocess.DEVNULL,
            cwd="/",  # `-m` imports from there, and the program's own folder may hold anything, or be deleted
            env={**os.environ, "PYTHONPATH": path},
        )
    finally:
        os.close(reader)
    try:
        yield
    finally:
        if os.getpid() == me.pid:  # else a forked child, which has nothing to say
            if not os.path.exists(folder):
                _send_home(watch, writer)
            os.close(writer)


def _send_home(watch: subprocess.Popen[bytes], writer: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(writer, _IN_ORDER)
    try:
        watch.wait(_WATCH_END_S)
    except subprocess.TimeoutExpired:  # it is stopped
        watch.kill()
        watch.wait()


def is_orphan_cleanup(process: Process) -> bool:
    """Whether it is the process that clears up: who ends all others at once leaves this one to do its work."""
    return f"-m {__spec__.name} " in process.command_line()


def watch(pipe: int, program: Process, folder: str) -> None:
    """Returns when the program has ended, and, unless it said that it did in order, nothing of its Ray is left."""
    if _ends_in_order(pipe, program):
        return
    end_all_of(folder, grace_s=_GRACE_S)
    remove_dead_sockets()
    shutil.rmtree(folder, ignore_errors=True)


def _ends_in_order(pipe: int, program: Process) -> bool:
    """Waits for the program's word, or its end. The end of the pipe alone means neither: a forked child of the program
    may hold its other end open, and the program itself may have closed it."""
    while not select.select([pipe], [], [], _LOOK_PERIOD_S)[0]:
        if program.is_known and not program.is_alive():
            break
    if select.select([pipe], [], [], 0)[0] and os.read(pipe, 1) == _IN_ORDER:
        return True
    while program.is_alive():
        time.sleep(_END_POLL_S)
    return False


def remove_dead_sockets() -> None:
    """Removes the socket folders of processes that were killed: nobody listens there any more."""
    for folder in Path(tempfile.gettempdir()).glob(SOCKET_FOLDERS):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            if folder.lstat().st_uid != os.getuid() or not (folder / "s").is_socket():
                continue
            if probe.connect_ex(str(folder / "s")) == errno.ECONNREFUSED:
                shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # sent to a whole group, they are meant for the program
    watch(int(sys.argv[1]), Process(int(sys.argv[2]), int(sys.argv[3])), sys.argv[4])
