"""Which servers run on this machine: one small file each, in a folder that only their user can read.

A file whose process is gone (by pid, start time and boot) is removed by whoever reads it: a server that was killed
leaves no lie behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rayllm.config import Environment
from rayllm.errors import ConfigError, EngineUnreachableError, did_you_mean
from rayllm.machine.folders import temporary_folders
from rayllm.machine.processes import Process, this_process

_PRIVATE = 0o700


@dataclass(frozen=True)
class Entry:
    """A server: the process that was started by a person, and what it serves."""

    pid: int
    started: int
    """The process's start, in clock ticks after boot."""
    boot: str
    command: str
    name: str
    model: str
    url: str
    log: str
    since: float
    """Unix seconds."""
    shutdown_timeout_s: float
    ray_address: str = ""
    """`host:port` of its Ray; empty until that runs."""
    ray_token: str = ""
    """What that Ray asks for; empty where it asks for nothing. A secret: the file is for its user alone."""

    def shown(self) -> dict[str, Any]:
        """What anybody may see of it."""
        return {name: value for name, value in asdict(self).items() if name != "ray_token"}

    @property
    def process(self) -> Process:
        return Process(self.pid, self.started)

    def is_alive(self) -> bool:
        return self.boot == _boot_id() and self.process.is_alive()


def runtime_folder() -> Path:
    """The user's folder for what runs now, made where it is missing: the first of the usual places that can be trusted.
    `ConfigError`, which says what is wrong with each, where there is none."""
    base = Environment.runtime_dir()
    own = f"rayllm-{os.getuid()}"
    places = [Path(base) / "rayllm"] if base else []
    places += [Path(folder) / own for folder in temporary_folders()]
    faults = []
    for folder in places:
        fault = _fault_of(folder)
        if fault is None:
            return folder
        faults.append(f"{str(folder)!r} {fault}")
    raise ConfigError(f"no usable runtime folder: {'; '.join(faults)}. Set XDG_RUNTIME_DIR to a folder that you own")


def _fault_of(folder: Path) -> str | None:
    """Makes the folder where it is missing. Why it cannot be used or trusted; None where it can."""
    try:
        folder.mkdir(mode=_PRIVATE, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return "is not a folder that you own"
        if stat.S_IMODE(found.st_mode) & 0o077:
            folder.chmod(_PRIVATE)
    except OSError as error:
        return f"cannot be made ({error.strerror})"
    return None if os.access(folder, os.W_OK | os.X_OK) else "cannot be written"


class Listing:
    """This process's own entry, as long as it is listed."""

    def __init__(self, entry: Entry, path: Path):
        self.entry = entry
        self._path = path
        self._write()

    def note_ray(self, address: str, token: str) -> None:
        """Says by which Ray the server's engine is reached."""
        self.entry = replace(self.entry, ray_address=address, ray_token=token)
        self._write()

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        try:
            descriptor, unfinished = tempfile.mkstemp(dir=self._path.parent)  # readable by its owner alone
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(asdict(self.entry), file)
            os.replace(unfinished, self._path)
        except OSError as error:
            raise ConfigError(
                f"runtime folder {str(self._path.parent)!r} cannot be written ({error.strerror}): make room, or set "
                "XDG_RUNTIME_DIR to another"
            ) from None


@contextlib.contextmanager
def listed(
    command: str,
    *,
    name: str,
    model: str,
    url: str,
    log: Path,
    shutdown_timeout_s: float,
    name_is_given: bool = True,
) -> Iterator[Listing]:
    """For the length of the block, this process is a running server, under a name that no other has: where `name` is
    taken it gets a number, unless the name `is given` by the user, which is a `ConfigError`."""
    me = this_process()
    folder = runtime_folder()
    with _locked(folder):
        name = _free_name(name, running(), name_is_given)
        entry = Entry(
            me.pid, me.started, _boot_id(), command, name, model, url, str(log), time.time(), shutdown_timeout_s
        )
        listing = Listing(entry, folder / f"{me.pid}.json")
    try:
        yield listing
    finally:
        listing.remove()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _free_name(name: str, entries: Sequence[Entry], name_is_given: bool) -> str:
    taken = {entry.name: entry for entry in entries}
    if name not in taken:
        return name
    if name_is_given:
        raise ConfigError(
            f"name={name!r} is taken by the server at {taken[name].url} (pid {taken[name].pid}): choose another, or "
            "leave it out for one with a number"
        )
    return next(f"{name}-{number}" for number in itertools.count(2) if f"{name}-{number}" not in taken)


def running() -> list[Entry]:
    """Servers that run now, the oldest first; files of those that have ended are removed."""
    found = []
    for path in runtime_folder().glob("*.json"):
        content = _read(path)
        entry = _entry(content)
        if entry is not None and entry.is_alive():
            found.append(entry)
        elif entry is not None or not _is_alive(content):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return sorted(found, key=lambda entry: entry.since)


def find(word: str | None) -> Entry:
    """The running server of that name, port, URL, pid or model, tried in this order; without a word, the only one.

    Raises `EngineUnreachableError` where there is none and `ConfigError` where more than one fits.
    """
    entries = _some_running()
    if word is None:
        return _only(entries)
    for fits in _KINDS:
        fitting = [entry for entry in entries if fits(entry, word)]
        if fitting:
            return _only(fitting)
    known = [known for entry in entries for known in (entry.name, str(entry.pid), entry.model, entry.url)]
    raise EngineUnreachableError(
        f"no server {word!r} is running here{did_you_mean(word, known)} ({shown_list(entries)})"
    )


def find_named(name: str | None) -> Entry:
    """The running server whose engine has that name; without a name, the only server. Errors are those of `find`."""
    entries = _some_running()
    if name is None:
        return _only(entries)
    fitting = [entry for entry in entries if entry.name == name]
    if not fitting:
        near = did_you_mean(name, [entry.name for entry in entries])
        raise EngineUnreachableError(f"no server named {name!r} is running here{near} ({shown_list(entries)})")
    return _only(fitting)


def find_at(word: str) -> Entry | None:
    """The server of this user at that port or URL; None where there is none, or no folder to list it in."""
    try:
        return next((entry for entry in running() if _is_at(entry, word)), None)
    except ConfigError:
        return None


def _some_running() -> list[Entry]:
    entries = running()
    if not entries:
        raise EngineUnreachableError("you have no running server on this machine: start one with 'rayllm serve'")
    return entries


def _only(fitting: Sequence[Entry]) -> Entry:
    if len(fitting) > 1:
        raise ConfigError(f"{len(fitting)} servers are running, name one of them: {shown_list(fitting)}")
    return fitting[0]


def shown_list(entries: Sequence[Entry]) -> str:
    """Them in one line of a message."""
    return ", ".join(f"{entry.name!r}: pid {entry.pid}, {entry.model} at {entry.url}" for entry in entries)


def _is_at(entry: Entry, word: str) -> bool:
    """Whether the word is its port or its address, in any usual form of that."""
    return word.removeprefix(":") == _port_of(entry.url) or _address(word) == _address(entry.url)


def _address(url: str) -> str:
    address = url.rpartition("://")[2].rstrip("/").removesuffix("/v1").rstrip("/")
    host, _, port = address.rpartition(":")
    return f"{'127.0.0.1' if host in ('localhost', '0.0.0.0') else host}:{port}"


def _port_of(url: str) -> str:
    return url.rpartition(":")[2]


_KINDS: tuple[Callable[[Entry, str], bool], ...] = (
    lambda entry, word: entry.name == word,
    _is_at,
    lambda entry, word: str(entry.pid) == word,
    lambda entry, word: entry.model == word,
)
"""Which words find a server, the surest first."""


def _read(path: Path) -> dict[str, Any]:
    """What a file says; nothing where it is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_alive(content: dict[str, Any]) -> bool:
    """Whether the process of another version's file runs."""
    pid, started = content.get("pid"), content.get("started")
    if type(pid) is not int or type(started) is not int or content.get("boot") != _boot_id():
        return False
    return Process(pid, started).is_alive()


def _entry(content: dict[str, Any]) -> Entry | None:
    """None where the file is another version's, and lacks what this one needs."""
    needed = {field.name for field in fields(Entry) if field.default is MISSING or field.name in content}
    if not needed <= content.keys():
        return None
    return Entry(**{name: content[name] for name in needed})


def _boot_id() -> str:
    """Changes at each boot, after which pids and start times begin anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
