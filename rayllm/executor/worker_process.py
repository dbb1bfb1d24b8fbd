"""Worker processes as the driver and its owner see them: where one lives, whether it runs, what it wrote last."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rayllm.config import ResolvedConfig
from rayllm.errors import without_paths
from rayllm.executor.inproc import one_line
from rayllm.executor.process_group import CUDA_ENVIRONMENT

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
END_TIMEOUT_S = 10.0
_MAX_ERROR_CHARACTERS = 300


@dataclass(frozen=True)
class WorkerPlace:
    """Where a worker process lives."""

    pid: int
    node_id: str
    host: str
    devices: tuple[str, ...]
    """What Ray gave it: `cuda:` and the GPU's id on its node, or `cpu`."""
    log_path: str = ""
    """The file on its node that its errors are written to."""


def worker_place() -> WorkerPlace:
    """Where this process lives, as Ray sees it."""
    import ray

    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", [])
    devices = tuple(f"cuda:{gpu}" for gpu in gpus) or ("cpu",)
    log_path = ""
    with contextlib.suppress(OSError):
        log_path = os.readlink("/proc/self/fd/2")
    return WorkerPlace(os.getpid(), context.get_node_id(), ray.util.get_node_ip_address(), devices, log_path)


def await_ends(places: Iterable[WorkerPlace]) -> None:
    """Waits until the processes, which run on this node and were ended, are gone and their memory is free."""
    alive = {place.pid for place in places}
    deadline = time.monotonic() + END_TIMEOUT_S
    while alive := {pid for pid in alive if _is_alive(pid)}:
        if time.monotonic() > deadline:
            log.warning("processes %s did not end within %g s", sorted(alive), END_TIMEOUT_S)
            return
        time.sleep(0.01)


def kill_process(place: WorkerPlace) -> bool:
    """Ends a Ray worker process of this node that may not listen to Ray; False where it is gone already."""
    with contextlib.suppress(OSError):
        if b"ray::" in Path(f"/proc/{place.pid}/cmdline").read_bytes():  # the number may be another's by now
            os.kill(place.pid, signal.SIGKILL)
            return True
    return False


def is_stopped(place: WorkerPlace) -> bool:
    """Whether a process of this node is seen to be stopped by a signal, or gone."""
    try:
        return Path(f"/proc/{place.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "TtZX"
    except OSError:
        return Path("/proc/self/stat").exists()  # without /proc nothing is known


def last_error(log: str) -> str:
    """The last error in a log, in one line: no traceback, no file paths, no markers of Ray."""
    left_out = (" ", "\t", "Traceback", ":actor_name:", ":task_name:", ":job_id:")
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith(left_out)]
    errors = [line for line in lines if re.search(r"[Ee]rror|[Ee]xception|[Kk]illed|[Ff]atal|out of memory", line)]
    return without_paths(" ".join((errors or lines or [""])[-1].split()))[:_MAX_ERROR_CHARACTERS]


def log_tail(place: WorkerPlace, num_bytes: int = 1000) -> str:
    """The last lines that a process of this node wrote; empty where there are none to be read."""
    try:
        with open(place.log_path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - num_bytes))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def death_reason(error: Exception) -> str:
    """Ray's account of an actor's death, in one line without its general advice."""
    text = " ".join(str(error).split())
    detail = re.search(r"Worker exit type: (\S+) Worker exit detail: (.*?)(?: Some common causes.*)?$", text)
    if detail:
        return f"its process died ({detail[1]}: {detail[2].rstrip('.')})"
    cause = re.search(r"(The actor (?:is dead because|died because).*)$", text)
    return cause[1] if cause else one_line(error)


def worker_environment(config: ResolvedConfig, single_node: bool) -> dict[str, str]:
    """Variables that a worker process needs before torch is imported."""
    variables = {"OMP_NUM_THREADS": str(config.num_threads)}
    if config.device == "cuda":
        variables |= CUDA_ENVIRONMENT
    if single_node:
        variables |= loopback_interfaces()
    return variables


def loopback_interfaces() -> dict[str, str]:
    """Variables that keep the sockets of a group within this node."""
    name = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
