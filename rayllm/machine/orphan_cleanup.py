"""The temporary folder of a Ray of our own, and a small process beside the program that ends that Ray and removes the
folder when the program is killed or interrupted; it outlives the program by seconds.

The process needs no Ray and imports nothing heavy, because it runs as long as the program. A program that has removed
the folder itself says so through a pipe, and the process ends without doing anything.
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
from dataclasses import dataclass
from pathlib import Path

from rayllm.machine.processes import Process, end_all_of, processes_of, this_process

SOCKET_FOLDERS = "rllm-*"
"""As `executor.channel.SocketDir` names them; that module is too heavy for here."""
_LOOK_PERIOD_S = 0.5
_END_POLL_S = 0.05
_CLEAR_POLL_S = 0.02
_GRACE_S = 0.5
_WATCH_END_S = 5.0
_SETTLE_S = 1.5
"""For how long the folder must stay away. A process that was being started when its Ray ended writes there, or has
ended, by then."""
_CLEAR_TIMEOUT_S = 10.0
_IN_ORDER = b"."
_SOURCE_ROOT = str(Path(__file__).resolve().parents[2])


@dataclass
class RayFolder:
    """The temporary folder of a Ray of our own."""

    path: str
    is_up: bool = False
    """Set once the Ray has started: from then on it starts no process that cannot be found."""


@contextlib.contextmanager
def ray_folder(path: str) -> Iterator[RayFolder]:
    """Makes the folder, for the length of the block. If this process is killed, the processes of the Ray whose
    temporary folder it is end, and the folder is removed. Children that this process started otherwise are left alone.

    A block that ends normally has ended its Ray and removed the folder. Where it has not, because it was interrupted,
    or where the interrupt came before the Ray was up, that is done when this process ends. No interrupt can leave the
    folder: it is made after the process that removes it has started.
    """
    reader, writer = os.pipe()
    me = this_process()
    command = [sys.executable, "-m", __spec__.name, str(reader), str(me.pid), str(me.started), path]
    search_path = os.pathsep.join(filter(None, (_SOURCE_ROOT, os.environ.get("PYTHONPATH"))))
    try:
        watch = subprocess.Popen(
            command,
            pass_fds=(reader,),
            start_new_session=True,  # a Ctrl-C is meant for the program
            stdin=subprocess.DEVNULL,
            cwd="/",  # `-m` imports from there, and the program's own folder may hold anything, or be deleted
            env={**os.environ, "PYTHONPATH": search_path},
        )
    finally:
        os.close(reader)
    folder = RayFolder(path)
    try:
        os.mkdir(path, 0o700)
        yield folder
    except Exception:  # the program may go on for long: its start has failed, and nothing is left for later
        if os.getpid() == me.pid and not folder.is_up:
            clear(path, settle_s=_SETTLE_S)
            folder.is_up = True
        raise
    finally:
        if os.getpid() == me.pid:  # else a forked child, which has nothing to say
            if folder.is_up and not os.path.lexists(path):
                _send_home(watch, writer)
            os.close(writer)


def clear(path: str, *, settle_s: float = 0.0, timeout_s: float = _CLEAR_TIMEOUT_S) -> bool:
    """Ends the processes of the Ray whose temporary folder this is and removes it, again and again until it has stayed
    away for `settle_s`: a process that was just starting may make it again. False where that takes too long."""
    deadline = time.monotonic() + settle_s + timeout_s
    gone_since: float | None = None
    while True:
        now = time.monotonic()
        if os.path.lexists(path) or processes_of(path):
            gone_since = None
            end_all_of(path, grace_s=0)
            shutil.rmtree(path, ignore_errors=True)
        elif gone_since is None:
            gone_since = now
        if gone_since is not None and now - gone_since >= settle_s:
            return True
        if now > deadline:
            return False
        time.sleep(_CLEAR_POLL_S)


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


def watch(pipe: int, program: Process, path: str) -> None:
    """Returns when the program has ended, and, unless it said that it has removed the folder itself, nothing of its Ray
    is left."""
    if _ends_in_order(pipe, program):
        return
    end_all_of(path, grace_s=_GRACE_S)
    clear(path, settle_s=_SETTLE_S)
    remove_dead_sockets()


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
