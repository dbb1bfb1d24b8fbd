"""Which processes did we start, and are they gone? Read from /proc; where there is none, nothing is seen."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_RAY_FOLDER_OPTIONS = tuple(f"--{kind}{sep}dir=" for kind in ("temp", "session", "log") for sep in "-_")
"""How Ray 2.60 names its folders to the processes that it starts (`ray/_private/services.py`)."""


@dataclass(frozen=True)
class Process:
    """A process by pid and start time, so that a number used again is not taken for it."""

    pid: int
    started: int
    """Clock ticks after boot; 0 where there is no /proc, and nothing can be known."""

    @property
    def is_known(self) -> bool:
        return self.started > 0

    def is_alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        stat = _read_stat(self.pid)
        return stat is not None and stat.started == self.started and stat.state not in "ZX"

    def is_stopped(self) -> bool:
        """Whether a signal such as SIGSTOP keeps it from running."""
        stat = _read_stat(self.pid)
        return stat is not None and stat.started == self.started and stat.state == "T"

    def names_as_its_ray(self, folder: str) -> bool:
        """Whether it was started for the Ray with this temporary folder, by its arguments: Ray's agents and workers
        show those until they have taken a title."""
        folders = (
            argument.partition("=")[2] for argument in self.arguments() if argument.startswith(_RAY_FOLDER_OPTIONS)
        )
        return any(given == folder or given.startswith(f"{folder}/") for given in folders)

    def writes_into(self, folder: str) -> bool:
        """Whether its standard output or standard error is a file below `folder`; of one of Ray's own that has named
        itself so (`ray::...`), whether any open file is: the output of Ray's agents goes into pipes of the raylet."""
        numbers = ["1", "2"]
        if self.command().startswith("ray::"):
            with contextlib.suppress(OSError):
                numbers = os.listdir(f"/proc/{self.pid}/fd")
        for number in numbers:
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{self.pid}/fd/{number}").startswith(f"{folder}/"):
                    return True
        return False

    def command(self) -> str:
        """Its short name; empty when it is gone."""
        try:
            return Path(f"/proc/{self.pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def command_line(self) -> str:
        """Its arguments joined by spaces, as it shows them; empty when it is gone."""
        return " ".join(self.arguments()).rstrip()

    def arguments(self) -> list[str]:
        """Its arguments; none when it is gone."""
        try:
            shown = Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except OSError:
            return []
        return shown.decode(errors="replace").removesuffix("\0").split("\0")

    def send(self, number: int) -> None:
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, number)


def this_process() -> Process:
    """The process that asks."""
    stat = _read_stat(os.getpid())
    return Process(os.getpid(), stat.started if stat else 0)


@dataclass(frozen=True)
class _Stat:
    state: str
    parent: int
    started: int


def _read_stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the command's name may hold spaces and brackets
    return _Stat(fields[0], int(fields[1]), int(fields[19]))


def process_of(pid: int) -> Process | None:
    """The process that has this number now; None where there is none, or no /proc."""
    stat = _read_stat(pid)
    return None if stat is None else Process(pid, stat.started)


def _read_stats() -> dict[int, _Stat]:
    stats = {}
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if entry.isdigit() and (stat := _read_stat(int(entry))):
            stats[int(entry)] = stat
    return stats


def descendants(root: int | None = None) -> set[Process]:
    """Every process that descends from `root` (default: this process), without `root` itself."""
    return _below([root or os.getpid()], _read_stats())


def _below(roots: list[int], stats: Mapping[int, _Stat]) -> set[Process]:
    children: dict[int, list[int]] = {}
    for pid, stat in stats.items():
        children.setdefault(stat.parent, []).append(pid)
    found: set[Process] = set()
    open_pids = list(roots)
    while open_pids:
        for pid in children.get(open_pids.pop(), ()):
            found.add(Process(pid, stats[pid].started))
            open_pids.append(pid)
    return found


def processes_of(folder: str) -> set[Process]:
    """The processes of the Ray whose temporary folder this is, and all below them, whoever their parent is by now:
    their output goes into that folder, their arguments name it as Ray's, or, as HAProxy's, their configuration lies
    there. Never this process."""
    stats = _read_stats()
    found = set()
    for pid, stat in stats.items():
        process = Process(pid, stat.started)
        if pid != os.getpid() and stat.state not in "ZX" and _is_of_ray(process, folder):
            found.add(process)
    below = _below([process.pid for process in found], stats)
    return {process for process in found | below if process.pid != os.getpid()}


def _is_of_ray(process: Process, folder: str) -> bool:
    if process.writes_into(folder) or process.names_as_its_ray(folder):
        return True
    return process.command() == "haproxy" and f"{folder}/" in process.command_line()


def end_all_of(folder: str, *, grace_s: float, timeout_s: float = 5.0) -> set[Process]:
    """`end_all` for `processes_of(folder)`, until there are none: one that ends may just have started another. Returns
    those that had to be killed."""
    killed: set[Process] = set()
    deadline = time.monotonic() + grace_s + timeout_s
    while (found := processes_of(folder)) and time.monotonic() < deadline:
        killed |= end_all(found, grace_s=grace_s)
        grace_s = 0.0
    return killed


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parent dies (Linux), so that none slips away unseen."""
    import ctypes

    pr_set_child_subreaper = 36
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def end_all(processes: set[Process], *, grace_s: float) -> set[Process]:
    """Waits `grace_s` for the processes to end by themselves, then kills the rest; returns those it had to kill."""
    if not _wait_gone(processes, grace_s):
        stubborn = {process for process in processes if process.is_alive()}
        for process in stubborn:
            process.send(signal.SIGKILL)
        _wait_gone(stubborn, 5.0)
        return stubborn
    return set()


def _wait_gone(processes: set[Process], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def end_child(process: subprocess.Popen[bytes]) -> None:
    """Kills a child process of this one, waits for its end and closes the pipes to it."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
