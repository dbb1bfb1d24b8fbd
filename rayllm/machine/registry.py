"""Which servers run on this machine: one small file each, in a folder that only their user can read.

A file whose process is gone (by pid, start time and boot) is removed by whoever reads it: a server that was killed
leaves no lie behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rayllm.config import Environment
from rayllm.errors import ConfigError, EngineUnreachableError, did_you_mean
from rayllm.machine.processes import Process, this_process

_PRIVATE = 0o700


@dataclass(frozen=True)
class Entry:
    """A server: the process that was started by a person, and what it serves."""

    pid: int
    started: int
    """The process's start, in clock ticks after boot."""
    boot: str
    verb: str
    name: str
    model: str
    url: str
    log: str
    since: float
    """Unix seconds."""
    shutdown_timeout_s: float

    @property
    def process(self) -> Process:
        return Process(self.pid, self.started)

    def is_alive(self) -> bool:
        return self.boot == _boot_id() and self.process.is_alive()


def runtime_folder() -> Path:
    """The user's folder for what runs now; made where it is missing. `ConfigError` where it cannot be trusted."""
    base = Environment.runtime_dir()
    folder = Path(base) / "rayllm" if base else Path(tempfile.gettempdir()) / f"rayllm-{os.getuid()}"
    try:
        folder.mkdir(mode=_PRIVATE, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(
            f"runtime folder {str(folder)!r} cannot be made ({error.strerror}): set XDG_RUNTIME_DIR"
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigError(f"runtime folder {str(folder)!r} is not a folder of yours: remove it or set XDG_RUNTIME_DIR")
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(_PRIVATE)
    return folder


@contextlib.contextmanager
def listed(verb: str, *, name: str, model: str, url: str, log: Path, shutdown_timeout_s: float) -> Iterator[None]:
    """For the length of the block, this process is a running server."""
    me = this_process()
    entry = Entry(me.pid, me.started, _boot_id(), verb, name, model, url, str(log), time.time(), shutdown_timeout_s)
    path = runtime_folder() / f"{me.pid}.json"
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent)  # readable by its owner alone
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(asdict(entry), file)
    os.replace(unfinished, path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def running() -> list[Entry]:
    """Servers that run now, the oldest first; files of others are removed."""
    found = []
    for path in runtime_folder().glob("*.json"):
        entry = _read(path)
        if entry is not None and entry.is_alive():
            found.append(entry)
        else:
            path.unlink(missing_ok=True)
    return sorted(found, key=lambda entry: entry.since)


def find(word: str | None) -> Entry:
    """The running server of that name, pid, model, port or URL; without a word, the only one.

    Raises `EngineUnreachableError` where there is none and `ConfigError` where more than one fits.
    """
    entries = running()
    if not entries:
        raise EngineUnreachableError("no server of yours runs on this machine: start one with 'rayllm serve'")
    fitting = [entry for entry in entries if word is None or word in _words(entry)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ConfigError(f"{len(fitting)} servers run, say which by its pid: {_pids(fitting)}")
    known = [known for entry in entries for known in _words(entry)]
    raise EngineUnreachableError(f"no server {word!r} runs here{did_you_mean(word or '', known)} ({_pids(entries)})")


def _pids(entries: Sequence[Entry]) -> str:
    return ", ".join(f"{entry.pid} ({entry.model} at {entry.url})" for entry in entries)


def _words(entry: Entry) -> tuple[str, ...]:
    return entry.name, str(entry.pid), entry.model, entry.url, f"{entry.url}/v1", entry.url.rpartition(":")[2]


def _read(path: Path) -> Entry | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Entry(**{field.name: content[field.name] for field in fields(Entry)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _boot_id() -> str:
    """Changes at each boot, after which pids and start times begin anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
