"""This process's connection to a Ray: the watch over the processes that it hangs on, and its end, which Ray cannot
delay. Imports Ray nowhere: whoever is connected has done so."""

from __future__ import annotations

import atexit
import json
import logging
import os
import socket
import struct
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayllm.executor.ray_private import connected_node
from rayllm.executor.ray_watch import RayProcess, RayWatch
from rayllm.machine.orphan_cleanup import remove_dead_sockets
from rayllm.machine.processes import Process, end_all_of, process_of, processes_of

log = logging.getLogger(__name__)

_CORE = ("gcs_server", "raylet")
_CORE_FILE = "ray-processes.json"
"""In the folder of a Ray of our own, for each process of it: what it hangs on."""
_GOODBYE_TIMEOUT_S = 6.0
_LOST_GOODBYE_TIMEOUT_S = 2.0
"""For what Ray does within this process when its other processes are dead; it takes 2 to 15 s."""
_LATE_GOODBYE_TIMEOUT_S = 30.0
_GRACE_S = 5.0
_PEER_CREDENTIALS = struct.Struct("3i")
_CONNECT_TIMEOUT_S = 1.0


def ray_is_initialized() -> bool:
    """Whether this process is connected to a Ray; does not import it."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


@dataclass
class _Current:
    """The watch of this process, over the session and in the process that it was made for."""

    key: tuple[int, str] | None = None
    watch: RayWatch | None = None
    goodbye: threading.Thread | None = None
    """Has this process disconnected from the Ray before."""


_current = _Current()
_lock = threading.Lock()


def ray_watch() -> RayWatch:
    """The watch over the Ray that this process is connected to; the same for all who ask. Of a Ray of our own it
    watches head and raylet; of one that was joined, the raylet of this node: a head may come back there. Without a
    connection, or with a Ray Client's, it sees nothing."""
    node = connected_node()
    if node is None:
        return RayWatch([])
    folder = str(node.get_temp_dir_path())
    return _watch_for(node, lambda: RayWatch(_noted(folder) or [_raylet_at(node.raylet_socket_name)]))


def watch_own_ray(folder: str) -> RayWatch:
    """The same in the program that has started the Ray of that temporary folder; notes for the others what to watch."""
    core = [RayProcess(each.command(), each) for each in processes_of(folder) if each.command() in _CORE]
    noted = [(each.name, each.process.pid, each.process.started) for each in core]
    (Path(folder) / _CORE_FILE).write_text(json.dumps(noted), encoding="utf-8")
    return _watch_for(connected_node(), lambda: RayWatch(core, ends_stopped=True))


def is_own_ray() -> bool:
    """Whether the Ray that this process is connected to was started by a program of ours, and ends with it."""
    node = connected_node()
    return node is not None and (Path(node.get_temp_dir_path()) / _CORE_FILE).exists()


def disconnect(folder: str | None = None) -> None:
    """Ends the connection, within seconds also where Ray is dead or stopped: what it still does within this process
    goes on beside it then, see `await_goodbye`. `folder`: the temporary folder of a Ray of our own, all of whose
    processes end."""
    if ray_is_initialized():
        is_lost = ray_watch().error is not None
        _drop_watch()  # what ends from here on ends in order
        if folder is not None and is_lost:
            end_all_of(folder, grace_s=0)  # Ray's goodbye would wait for them
        _say_goodbye(folder, _LOST_GOODBYE_TIMEOUT_S if is_lost else _GOODBYE_TIMEOUT_S)
    if folder is not None:
        killed = end_all_of(folder, grace_s=_GRACE_S)
        if killed:
            log.warning("killed processes that did not end: %s", sorted(process.pid for process in killed))
        remove_dead_sockets()


def _say_goodbye(folder: str | None, timeout_s: float) -> None:
    shutdown = sys.modules["ray"].shutdown
    _current.goodbye = goodbye = threading.Thread(target=shutdown, name="ray-shutdown", daemon=True)
    goodbye.start()
    goodbye.join(timeout_s)
    if goodbye.is_alive() and folder is not None and end_all_of(folder, grace_s=0):
        goodbye.join(timeout_s)
    if goodbye.is_alive():
        log.warning("Ray did not disconnect this process within %g s", timeout_s)
        atexit.unregister(shutdown)  # which would wait for the one that is under way, without an end
        atexit.register(await_goodbye, _GOODBYE_TIMEOUT_S)


def await_goodbye(timeout_s: float = _LATE_GOODBYE_TIMEOUT_S) -> bool:
    """Whether this process is free of the Ray that it left before, after at most that time. One that ends at once
    otherwise should end by `os._exit`: Ray's threads are still at work."""
    if _current.goodbye is not None:
        _current.goodbye.join(timeout_s)
        return not _current.goodbye.is_alive()
    return True


def _watch_for(node: Any, make: Any) -> RayWatch:
    key = os.getpid(), str(node.get_session_dir_path())
    with _lock:
        if _current.key != key or _current.watch is None:
            if _current.watch is not None:
                _current.watch.close()
            _current.key, _current.watch = key, make()
        return _current.watch


def _drop_watch() -> None:
    with _lock:
        watch, _current.watch = _current.watch, None
    if watch is not None:
        watch.close()


def _noted(folder: str) -> list[RayProcess]:
    try:
        noted = json.loads((Path(folder) / _CORE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    return [RayProcess(name, Process(pid, started)) for name, pid, started in noted]


def _raylet_at(socket_path: str) -> RayProcess:
    """Who listens there. A process that cannot be, and counts as dead, where nobody does."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_CONNECT_TIMEOUT_S)
        try:
            probe.connect(socket_path)
            option = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        except ConnectionError:
            return RayProcess("raylet", Process(0, 1))
        except (OSError, AttributeError):  # nothing is known
            return RayProcess("raylet", Process(0, 0))
    return RayProcess("raylet", process_of(_PEER_CREDENTIALS.unpack(option)[0]) or Process(0, 0))
