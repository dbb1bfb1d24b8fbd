"""This process's connection to the Ray of a running server, shared by all who use an engine there.

A process can be connected to one Ray at a time. The connection ends with the last who holds it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping

from rayllm.config import RAY_NAMESPACE
from rayllm.errors import EngineUnreachableError
from rayllm.executor.ray_cluster import job_config, prepare_environment, quieten_ray
from rayllm.executor.ray_connection import disconnect, ray_is_initialized
from rayllm.executor.ray_private import asks_for_token, read_environment_again
from rayllm.machine.folders import check_working_folder
from rayllm.machine.ray_token import read_ray_token

_ANSWER_TIMEOUT_S = 2.0
_CLUSTER_ID = "/ray.rpc.NodeInfoGcsService/GetClusterId"


class SharedRay:
    """Counts who uses the connection that it made; `join`, and what it returns, are safe in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders: set[object] = set()
        self._address = ""
        self._undo = contextlib.ExitStack()

    @property
    def is_held(self) -> bool:
        """Whether this process is connected because somebody joined here, and not by itself."""
        return bool(self._holders) and ray_is_initialized()

    def join(self, address: str, token: str) -> Callable[[], None]:
        """Connects to the Ray at `address` (`host:port`), whose token is `token` (empty: it asks for none). Raises
        `EngineUnreachableError` within seconds where that is not possible.

        Returns what releases the connection, which ends with the last of its holders. A connection that was lost
        counts for nothing when it is released after the next one was made."""
        with self._lock:
            if self.is_held and self._address != address:
                raise EngineUnreachableError(
                    f"this process uses an engine in the Ray at {self._address}, and a process can be connected to one "
                    f"Ray: close that engine before one in the Ray at {address} is used"
                )
            if not self.is_held:
                self._holders.clear()
                self._undo.close()  # of a connection that was lost: the environment is as before it
                self._connect(address, token)
                self._address = address
            holder = object()
            self._holders.add(holder)
        return lambda: self._release(holder)

    def _release(self, holder: object) -> None:
        with self._lock:
            if holder not in self._holders:
                return
            self._holders.remove(holder)
            if not self._holders:
                self._undo.close()

    def _connect(self, address: str, token: str) -> None:
        check_working_folder()
        _check_answers(address, token)
        with contextlib.ExitStack() as undo:
            undo.enter_context(_environment(_settings(address, token)))
            undo.callback(disconnect)
            prepare_environment(own_cluster=False)
            _init(address)
            self._undo = undo.pop_all()


def cluster_address() -> str:
    """The address of the Ray that this process is connected to."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def ray_token_in_use() -> str:
    """The token by which this process's Ray knows it; empty where that Ray asks for none."""
    return read_ray_token() if asks_for_token() else ""


def _settings(address: str, token: str) -> dict[str, str]:
    settings = {"RAY_AUTH_MODE": "token" if token else "disabled"}
    if token:
        settings["RAY_AUTH_TOKEN"] = token
    if address.startswith(("127.", "localhost:", "[::1]:")):
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # this process listens on loopback alone, as that Ray does
    return settings


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """The environment with `settings`, also as Ray's library has read it, for the length of the block."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    read_environment_again(also_token=True)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        read_environment_again(also_token=True)


def _check_answers(address: str, token: str) -> None:
    """Asks the Ray there for its id, which takes milliseconds: Ray itself would try for a minute, and not say why."""
    import grpc

    metadata = [("authorization", f"Bearer {token}")] if token else []
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address, options=options) as channel:
        try:
            channel.unary_unary(_CLUSTER_ID)(b"", timeout=_ANSWER_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            code = error.code()
            if code == grpc.StatusCode.UNAUTHENTICATED:
                raise EngineUnreachableError(
                    f"the Ray at {address} refuses this process's token: use the token of the server's user "
                    "(RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token)"
                ) from None
            reason = "timed out" if code == grpc.StatusCode.DEADLINE_EXCEEDED else "nothing listens there"
            raise EngineUnreachableError(f"the Ray at {address} does not answer ({reason})") from None


def _init(address: str) -> None:
    import ray

    quieten_ray()
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if in_main_thread else None
    try:
        ray.init(
            address=address,
            job_config=job_config(),
            namespace=RAY_NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # ConnectionError, RuntimeError (other versions of Ray or Python), RaySystemError
        reason = " ".join(str(error).split())[:300]
        raise EngineUnreachableError(f"cannot connect to the Ray at {address}: {reason}") from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, handler)
