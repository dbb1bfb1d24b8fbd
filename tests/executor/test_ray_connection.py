"""This process's connection to a Ray: what it watches, and its end, with Ray's own part faked."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayllm.executor import ray_connection
from rayllm.executor.ray_connection import await_goodbye, disconnect, is_own_ray, ray_is_initialized, ray_watch
from rayllm.machine.processes import process_of

LOST_TIMEOUT_S = 60
"""Long: what is waited for comes by an event."""


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """This process as if it had never been connected."""
    made = ray_connection._Current()
    monkeypatch.setattr(ray_connection, "_current", made)
    yield made
    ray_connection._drop_watch()


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def connect(monkeypatch: pytest.MonkeyPatch, folder: Path, socket_path: Path | None = None) -> None:
    """As if this process were connected to the Ray of that folder."""
    node = SimpleNamespace(
        get_temp_dir_path=lambda: str(folder),
        get_session_dir_path=lambda: str(folder / "session"),
        raylet_socket_name=str(socket_path or folder / "raylet"),
    )
    monkeypatch.setattr(ray_connection, "connected_node", lambda: node)


def fake_ray(monkeypatch: pytest.MonkeyPatch, shutdown: Callable[[], None]) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True, shutdown=shutdown))
    monkeypatch.setattr(ray_connection, "connected_node", lambda: None)


def note(folder: Path, child: subprocess.Popen[bytes]) -> None:
    process = process_of(child.pid)
    assert process is not None
    noted = [("gcs_server", process.pid, process.started)]
    (folder / "ray-processes.json").write_text(json.dumps(noted), encoding="utf-8")


def test_a_process_without_ray_is_not_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    assert not ray_is_initialized()
    assert "ray" not in sys.modules
    fake_ray(monkeypatch, lambda: None)
    assert ray_is_initialized()


def test_without_a_connection_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_connection, "connected_node", lambda: None)
    watch = ray_watch()
    assert watch.error is None
    watch.close()
    assert not is_own_ray()


def test_of_a_ray_of_our_own_the_noted_processes_are_watched(
    current: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, child: subprocess.Popen[bytes]
) -> None:
    note(tmp_path, child)
    connect(monkeypatch, tmp_path)
    assert is_own_ray()
    watch = ray_watch()
    assert ray_watch() is watch
    child.kill()
    assert watch.wait_lost(LOST_TIMEOUT_S)
    assert f"gcs_server (pid {child.pid})" in str(watch.error)


def test_another_session_has_a_watch_of_its_own(
    current: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, child: subprocess.Popen[bytes]
) -> None:
    watches = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        note(folder, child)
        connect(monkeypatch, folder)
        watches.append(ray_watch())
    assert watches[0] is not watches[1]


def test_of_a_ray_that_was_joined_the_raylet_is_watched(
    current: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "raylet"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        assert ray_connection._raylet_at(str(path)).process.pid == os.getpid()
    connect(monkeypatch, tmp_path, path)  # where nobody listens now
    assert not is_own_ray()
    assert ray_watch().wait_lost(LOST_TIMEOUT_S)
    assert not ray_connection._raylet_at(str(tmp_path / "none")).process.is_known


def test_the_program_that_started_ray_notes_its_core_for_the_others(
    current: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, child: subprocess.Popen[bytes]
) -> None:
    process = process_of(child.pid)
    assert process is not None

    class Named:
        """The child, by another name."""

        def __init__(self, name: str):
            self.name = name

        def command(self) -> str:
            return self.name

        def __getattr__(self, name: str) -> Any:
            return getattr(process, name)

    found = [Named("raylet"), Named("dashboard")]
    monkeypatch.setattr(ray_connection, "processes_of", lambda folder: found)
    connect(monkeypatch, tmp_path)
    watch = ray_connection.watch_own_ray(str(tmp_path))
    assert ray_watch() is watch
    noted = ray_connection._noted(str(tmp_path))
    assert [(each.name, each.process) for each in noted] == [("raylet", process)]


def test_disconnecting_shuts_ray_down_once_and_ends_its_processes(
    current: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fake_ray(monkeypatch, lambda: calls.append("shutdown"))

    def end_all_of(folder: str, grace_s: float) -> list[Any]:
        calls.append(f"end {folder}")
        return []

    monkeypatch.setattr(ray_connection, "end_all_of", end_all_of)
    monkeypatch.setattr(ray_connection, "remove_dead_sockets", lambda: calls.append("sockets"))
    monkeypatch.setattr(ray_connection, "_GOODBYE_TIMEOUT_S", LOST_TIMEOUT_S)
    disconnect("folder")
    assert calls == ["shutdown", "end folder", "sockets"]
    assert await_goodbye(0)


def test_a_ray_that_does_not_let_go_is_left_behind(current: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = threading.Event()
    fake_ray(monkeypatch, let_go.wait)  # type: ignore[arg-type]
    at_exit: list[Any] = []
    unregistered: list[Any] = []
    patched = SimpleNamespace(register=lambda *call: at_exit.append(call), unregister=unregistered.append)
    monkeypatch.setattr(ray_connection, "atexit", patched)
    monkeypatch.setattr(ray_connection, "_GOODBYE_TIMEOUT_S", 0.01)
    disconnect()
    assert not await_goodbye(0)
    assert at_exit == [(await_goodbye, 0.01)]
    assert unregistered == [let_go.wait]
    let_go.set()
    assert await_goodbye(LOST_TIMEOUT_S)


def test_without_a_goodbye_there_is_nothing_to_wait_for(current: Any) -> None:
    assert await_goodbye(0)
