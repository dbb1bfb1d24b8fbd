"""Clears up after a server that was killed: a small process beside `rayllm serve` that outlives it by seconds.

It holds one end of a pipe. A server that stops in order says so on it; when the pipe ends without a word, whatever
the server had started is ended and its folder removed. Imports nothing heavy: it is there for the whole life of a
server.
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
from collections.abc import Iterator
from pathlib import Path

from rayllm.machine.processes import Process, descendants, end_all

SOCKET_FOLDERS = "rllm-*"
"""As `executor.channel.SocketDir` names them; that module is too heavy for here."""
_LOOK_PERIOD_S = 1.0
_GRACE_S = 3.0
_ALL_IS_WELL = b"."


@contextlib.contextmanager
def cleared_up_after_death(folder: str) -> Iterator[None]:
    """For the length of the block: if this process is killed, its descendants end and `folder` goes."""
    reader, writer = os.pipe()
    command = [sys.executable, "-m", __spec__.name, str(reader), str(os.getpid()), folder]
    try:
        watch = subprocess.Popen(command, pass_fds=(reader,), start_new_session=True, stdin=subprocess.DEVNULL)
    finally:
        os.close(reader)
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            os.write(writer, _ALL_IS_WELL)
        os.close(writer)
        watch.wait()


def is_death_watch(process: Process) -> bool:
    """Whether it is the process that clears up: who ends all others at once leaves this one to do its work."""
    return f"-m {__spec__.name} " in process.command_line()


def watch(pipe: int, server: int, folder: str) -> None:
    """Returns when the server has stopped, and nothing of it is left."""
    seen: set[Process] = set()
    me = os.getpid()
    while not select.select([pipe], [], [], _LOOK_PERIOD_S)[0]:
        # Looked at all the time: a process whose parent is gone is nobody's descendant any more.
        seen = {process for process in seen | descendants(server) if process.is_alive() and process.pid != me}
    if os.read(pipe, 1) == _ALL_IS_WELL:
        return
    for process in list(seen):
        seen |= descendants(process.pid)
    end_all(seen, grace_s=_GRACE_S)
    remove_dead_sockets()
    shutil.rmtree(folder, ignore_errors=True)


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
        signal.signal(number, signal.SIG_IGN)  # sent to a whole group, they are meant for the server
    watch(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
