"""Which processes did we start, and are they gone? Read from /proc; where there is none, nothing is seen."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process by pid and start time, so that a number used again is not taken for it."""

    pid: int
    started: int
    """Clock ticks after boot."""

    def is_alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        stat = _read_stat(self.pid)
        return stat is not None and stat.started == self.started and stat.state not in "ZX"

    def command(self) -> str:
        """Its short name; empty when it is gone."""
        try:
            return Path(f"/proc/{self.pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def command_line(self) -> str:
        """Its arguments joined by spaces, as it shows them; empty when it is gone."""
        try:
            shown = Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except OSError:
            return ""
        return shown.replace(b"\0", b" ").decode(errors="replace").rstrip()

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


def descendants(root: int | None = None) -> set[Process]:
    """Every process that descends from `root` (default: this process), without `root` itself."""
    stats = {}
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if entry.isdigit() and (stat := _read_stat(int(entry))):
            stats[int(entry)] = stat
    children: dict[int, list[int]] = {}
    for pid, stat in stats.items():
        children.setdefault(stat.parent, []).append(pid)
    found: set[Process] = set()
    open_pids = [root or os.getpid()]
    while open_pids:
        for pid in children.get(open_pids.pop(), ()):
            found.add(Process(pid, stats[pid].started))
            open_pids.append(pid)
    return found


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
