"""A server in the background: found among those that run here, or started, so that it stays when its terminal goes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayllm.cli.flags import UsageError, flag_name
from rayllm.config import Environment, parse_settings
from rayllm.errors import ConfigError, EngineError
from rayllm.machine.registry import Entry, running, runtime_folder

if TYPE_CHECKING:
    from rayllm.cli.terminal import LiveStages
    from rayllm.config import EngineConfig

_DEFAULT_PORT = 8000
_POLL_S = 0.2
_LISTED_TIMEOUT_S = 30.0
"""For a process that was started to say that it is a server."""
_STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Found:
    """A server that is ready, and whether it was started here."""

    entry: Entry
    is_new: bool


def find_or_start(model: str | None, settings: Mapping[str, Any], port: int | None) -> Found:
    """A ready server for `model`: a folder, a hub's name, or a name that a running server has given it. None: the only
    server's, else the built-in model.

    `settings` are the engine's, for a server that has to be started: `UsageError` where one serves the model already.
    Raises `ConfigError` for what cannot be served and `EngineError` for a start that fails, in the server's own words.
    """
    with _one_at_a_time():
        entry = _fitting(model, settings)
        if entry is not None:
            if settings:
                name = flag_name(next(iter(settings)))
                raise UsageError(
                    f"{name} is of a server to start, and {entry.model} is served already at {entry.url}: "
                    f"leave it out, or end that one first with 'rayllm stop {entry.pid}'"
                )
            started = None
        else:
            engine, started, output = _start({"model": model or "", **settings}, port)
            entry = _listed(started, engine, output)
    _await_ready(entry, started)
    return Found(entry, started is not None)


def stop(entry: Entry) -> None:
    """Ends a server in order, and waits for it. `EngineError` where it does not end."""
    entry.process.send(signal.SIGTERM)
    deadline = time.monotonic() + entry.shutdown_timeout_s + _STOP_TIMEOUT_S
    while entry.is_alive():
        if time.monotonic() > deadline:
            raise EngineError(
                f"the server (pid {entry.pid}) is still running: stop it with 'rayllm stop {entry.pid} --force'"
            )
        time.sleep(_POLL_S)


# ------------------------------------------------------------------------------------------------------- finding one


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Two commands that are given at one moment start one server."""
    with (runtime_folder() / "run.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another 'rayllm run' to start its server", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fitting(model: str | None, settings: Mapping[str, Any]) -> Entry | None:
    """The newest server that serves the model. `UsageError` where none is named and several run."""
    entries = running()
    if model is None:
        if len(entries) > 1 and not settings:
            served = ", ".join(f"{entry.model} ({entry.url})" for entry in entries)
            raise UsageError(f"{len(entries)} servers are running, name the MODEL of one of them: {served}")
        return entries[0] if entries and not settings else None

    from rayllm.engine.owner.resolve import served_name

    names = {model, served_name(model)}
    return next((entry for entry in reversed(entries) if {entry.model, entry.name} & names), None)


# ------------------------------------------------------------------------------------------------------ starting one


def _start(settings: Mapping[str, Any], port: int | None) -> tuple[EngineConfig, subprocess.Popen[bytes], Path]:
    """Checks what can be checked, downloads the model where it is not here, and starts `rayllm serve` in a session of
    its own. Returns the file that its output goes to, too."""
    from rayllm.cli.serving import check_before_start
    from rayllm.cli.terminal import new_log_file

    engine, server = parse_settings({**settings, "port": _port(port)})
    check_before_start(engine, server)
    log = new_log_file("run")
    output = log.with_suffix(".out")
    flags = [f"{flag_name(name)}={value}" for name, value in settings.items() if name != "model"]
    model = (
        [os.path.abspath(os.path.expanduser(engine.model))] if os.path.isdir(os.path.expanduser(engine.model)) else []
    )
    model = model or ([engine.model] if engine.model else [])
    command = [sys.executable, "-m", "rayllm", "serve", *model, "--port", str(server.port), "--log-file", str(log)]
    with output.open("ab") as file:
        os.chmod(output, 0o600)
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        started = subprocess.Popen([*command, *flags], start_new_session=True, **streams)
    return engine, started, output


def _port(given: int | None) -> int:
    """The port that was asked for; else the usual one, or any where that is taken."""
    from rayllm.machine.ports import check_port

    if given is not None or Environment.ray_address() is not None:
        return _DEFAULT_PORT if given is None else given
    try:
        check_port("127.0.0.1", _DEFAULT_PORT)
    except ConfigError:
        return 0
    return _DEFAULT_PORT


def _listed(started: subprocess.Popen[bytes], engine: EngineConfig, output: Path) -> Entry:
    """What the registry says of the server, once it does."""
    deadline = time.monotonic() + _LISTED_TIMEOUT_S
    while True:
        entry = next((entry for entry in running() if entry.pid == started.pid), None)
        if entry is not None:
            return entry
        _raise_if_ended(started, output)
        if time.monotonic() > deadline:
            started.terminate()
            raise EngineError(f"the server did not start within {_LISTED_TIMEOUT_S:g} s (details: {output})")
        time.sleep(_POLL_S)


def _raise_if_ended(started: subprocess.Popen[bytes], output: Path) -> None:
    """`EngineError` with the server's last words, where it has ended."""
    if started.poll() is None:
        return
    lines = output.read_text(encoding="utf-8", errors="replace").split("\n") if output.exists() else []
    said = next((line for line in reversed(lines) if line.strip()), f"exit code {started.returncode}")
    raise EngineError(f"the server did not start: {said.removeprefix('rayllm serve: ')}")


def _await_ready(entry: Entry, started: subprocess.Popen[bytes] | None) -> None:
    """Shows the stages of a start on stderr, also of one that somebody else began. Ctrl-C ends a server that was
    started here."""
    from rayllm.cli.client import ApiClient

    shown: _Stages | None = None
    is_ready = False
    try:
        with ApiClient(entry.url, Environment.api_key(), timeout_s=5.0) as client:
            while (stage := client.stage()) != "ready":
                if started is not None:
                    _raise_if_ended(started, Path(entry.log).with_suffix(".out"))
                if not entry.is_alive():
                    raise EngineError(f"the server of {entry.model} (pid {entry.pid}) ended (details: {entry.log})")
                shown = shown or _Stages()
                shown.show("starting Ray" if stage in ("not reachable", "does not answer") else stage)
                time.sleep(_POLL_S)
        is_ready = True
    except KeyboardInterrupt:
        if started is not None:
            started.terminate()
            print(f"\nthe server that was starting (pid {started.pid}) has been stopped", file=sys.stderr)
        raise
    finally:
        if shown is not None:
            shown.end(ok=is_ready)


class _Stages:
    """On stderr: standard output is for answers alone."""

    def __init__(self) -> None:
        from rayllm.cli.terminal import LiveStages, is_terminal

        self._live: LiveStages | None = LiveStages(sys.stderr) if is_terminal(sys.stderr) else None
        self._last = ""

    def show(self, stage: str) -> None:
        if self._live is not None:
            self._live.show(stage)
        elif (stem := stage.partition(": ")[0]) != self._last:
            self._last = stem
            print(f"{stage} ...", file=sys.stderr, flush=True)

    def end(self, *, ok: bool) -> None:
        if self._live is not None:
            self._live.end(ok=ok)
