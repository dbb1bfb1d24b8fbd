"""A Ray to run in: the one this process is connected to, the one at RAY_ADDRESS, or one of our own."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import secrets
import socket
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rayllm.config import RAY_NAMESPACE, Environment
from rayllm.errors import ConfigError, EngineError, EngineUnreachableError
from rayllm.executor.ray_access import check_access
from rayllm.executor.ray_connection import await_goodbye, disconnect, ray_is_initialized, watch_own_ray
from rayllm.executor.ray_private import (
    keep_working_folder_out,
    latest_cluster,
    read_environment_again,
    redirect_messages,
)
from rayllm.machine.folders import check_working_folder
from rayllm.machine.orphan_cleanup import clear, ray_folder
from rayllm.machine.ray_token import ensure_ray_token

logger = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 128 * 2**20
_REACH_TIMEOUT_S = 5.0


@contextlib.contextmanager
def connected_ray(
    num_cpus: int,
    environment: Callable[[str], Mapping[str, str]] = lambda folder: {},
    while_connecting: Callable[[], None] | None = None,
) -> Iterator[bool]:
    """A connection to Ray for the length of the block; yields whether that Ray is our own and ends with it.

    Our own listens on loopback alone, prints nothing, and counts `num_cpus` logical CPUs; its processes find what
    `environment` says, given a folder that goes with it. `while_connecting` runs in a thread until then. However the
    block or this process ends, nothing of our own Ray is left; a Ray that was joined is left as it is.

    Raises `EngineUnreachableError` where no Ray answers at RAY_ADDRESS, and `EngineError` where our own does not start.
    """
    await_goodbye()
    if ray_is_initialized():
        yield False
        return
    address = Environment.ray_address()
    check_working_folder()
    if address is None:
        with _own_ray(num_cpus, environment, while_connecting):
            yield True
        return
    address = running_cluster() if address == "auto" else address
    check_reachable(address)
    # In another mode than the cluster's a program connects, and then nothing of the cluster can answer it.
    os.environ.setdefault("RAY_AUTH_MODE", "token" if check_access(address) else "disabled")
    prepare_environment(own_cluster=False)
    pid = os.getpid()
    try:
        _connect(while_connecting, address=address)
        yield False
    finally:
        if os.getpid() == pid:
            disconnect()


def leave_ray_at_fork() -> None:
    """Has children that this process forks end without Ray's own end, which waits for threads that a child has not."""
    import ray

    os.register_at_fork(after_in_child=functools.partial(atexit.unregister, ray.shutdown))


@contextlib.contextmanager
def _own_ray(
    num_cpus: int, environment: Callable[[str], Mapping[str, str]], while_connecting: Callable[[], None] | None
) -> Iterator[None]:
    prepare_environment(own_cluster=True)
    pid = os.getpid()
    with ray_folder(_new_folder_path()) as folder:
        try:
            os.environ.update(environment(folder.path))
            _connect(
                while_connecting,
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=folder.path,
            )
            watch_own_ray(folder.path)
            folder.is_up = True
            yield
        finally:
            if os.getpid() == pid:  # a forked child that leaves the block must not end its parent's Ray
                disconnect(folder.path)
                # Where Ray's own end is still under way it would make the folder again: it goes with this process.
                if await_goodbye(0) and not clear(folder.path):
                    logger.warning("the temporary folder %s of Ray cannot be removed: remove it by hand", folder.path)


def _new_folder_path() -> str:
    """A short one: paths of the sockets below it may have 107 bytes at most."""
    return os.path.join("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir(), f"rl-{secrets.token_hex(4)}")


def _connect(while_connecting: Callable[[], None] | None, **options: Any) -> None:
    import ray

    quieten_ray()
    leave_ray_at_fork()
    if while_connecting is not None:  # not before Ray is imported: that reads the environment
        threading.Thread(target=while_connecting, name="while_connecting", daemon=True).start()
    try:
        ray.init(
            job_config=job_config(),
            namespace=RAY_NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **options,
        )
    except ConnectionError as error:
        raise _unreachable(str(options["address"]), str(error)) from None
    except OSError as error:
        raise EngineError(f"Ray did not start: {error}") from error
    except Exception as error:  # Ray has no class of its own for a node that does not come up
        reason = " ".join(str(error).split())[:300]
        raise EngineError(f"Ray did not start, is the machine too busy or short of memory? {reason}") from error


def job_config() -> Any:
    """Ray's settings of a job, with which workers do not take modules from this process's working folder where the
    process itself does not: Ray would put it before all installed packages, whatever lies there."""
    from ray.job_config import JobConfig

    config = JobConfig()
    keep_working_folder_out(config)
    return config


def running_cluster() -> str:
    """`host:port` of the Ray cluster of this machine, the latest that `ray start` started or joined where there are
    several. `EngineUnreachableError` without any."""
    found = latest_cluster()
    if found is None:
        raise _unreachable("auto", "none runs on this machine")
    return found


def check_reachable(address: str) -> None:
    """Within seconds, what Ray would find out after a minute, if at all. `EngineUnreachableError` where nothing listens
    at `host:port`, and `ConfigError` for what is no address, or a Ray Client's, over which no engine can be reached."""
    if "://" in address:
        raise ConfigError(
            f"RAY_ADDRESS={address!r} is a Ray Client's address: run this on a node of the cluster, with "
            "RAY_ADDRESS=auto, or send it there with 'ray job submit'"
        )
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        raise ConfigError(f"RAY_ADDRESS={address!r} is not an address: give auto, or HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, getattr(error, "strerror", None) or str(error)) from None


def _unreachable(address: str, reason: str) -> EngineUnreachableError:
    return EngineUnreachableError(
        f"no Ray cluster answers at RAY_ADDRESS={address!r} ({' '.join(reason.split())}): start one there with "
        "'ray start --head', or unset RAY_ADDRESS for a Ray of its own"
    )


def quieten_ray() -> None:
    """What raylets have this program print goes to the log: standard output is for answers. It is also about workers
    that this program ended itself."""
    redirect_messages(lambda line: logger.info("Ray: %s", line))


def prepare_environment(*, own_cluster: bool) -> None:
    """Settings that Ray and its children read from the environment. Best before Ray is imported: one that was imported
    before listens on all interfaces, behind its token."""
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # its 5 s are too short on a busy machine
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_AUTH_MODE": "token",
    }
    if own_cluster:
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # listen on loopback alone
        settings["RAY_worker_niceness"] = "0"  # Ray's own 15 starves an engine beside any other busy program
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if os.environ["RAY_AUTH_MODE"] == "token":
        ensure_ray_token()
    read_environment_again(also_token=False)
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
