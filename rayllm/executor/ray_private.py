"""The private names of Ray that RayLLM uses, read in Ray 2.60; no other module names any (tests/test_private_names.py).
Serve's are in `serve/serve_private.py`. Imports Ray only when it is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

_KV_NAMESPACE = b"rayllm"


def connected_node() -> Any:
    """Ray's `Node` of this process, with the session's folders and the raylet's socket; None without a connection. The
    public runtime context knows neither."""
    ray = sys.modules.get("ray")
    return ray._private.worker._global_node if ray is not None and ray.is_initialized() else None


def free_resources() -> dict[str, dict[str, float]]:
    """What is free on each node, by node id. Publicly Ray gives the sum over all nodes."""
    from ray._private.state import available_resources_per_node

    found: dict[str, dict[str, float]] = available_resources_per_node()
    return found


def latest_cluster() -> str | None:
    """`host:port` of the latest cluster that `ray start` started or joined on this machine; None without any."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        found = canonicalize_bootstrap_address("auto")
    except ConnectionError:
        return None
    return None if found is None else str(found)


def asks_for_token() -> bool:
    """Whether the Ray that this process is connected to refuses who does not show its token."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return bool(is_token_auth_enabled())


def read_environment_again(*, also_token: bool) -> None:
    """Has Ray's library, where it is imported, read its settings from the environment again: it keeps what it read at
    import, and the token apart from that."""
    if "ray" in sys.modules:
        library = sys.modules["ray"]._raylet
        library.Config.initialize("")
        if also_token:
            library.AuthenticationTokenLoader.instance().reset_cache()


def redirect_messages(on_line: Callable[[str], None]) -> None:
    """What raylets have this program print ("A worker died ...") goes to `on_line`. Ray prints it on standard output,
    and has no setting for that."""
    from ray._private import worker

    def note(message: dict[str, Any], ignore_prefix: bool = False) -> None:
        for line in message["lines"]:
            on_line(line)

    worker.print_to_stdstream = note


class _DriversPath(list[str]):
    """Folders that workers import modules from: of those that Ray adds, the ones that this process imports from too."""

    def extend(self, folders: Iterable[str]) -> None:
        own = {os.path.abspath(folder) for folder in sys.path}
        super().extend(folder for folder in folders if os.path.abspath(folder) in own)


def keep_working_folder_out(job_config: Any) -> None:
    """Has workers of a job import nothing from this process's working folder where the process itself does not. Ray
    puts that folder before all installed packages, and has no setting for it."""
    job_config._py_driver_sys_path = _DriversPath()


def kv_put(key: bytes, value: bytes) -> None:
    """Leaves a value with Ray's head, under a key of RayLLM's own. Publicly Ray keeps only objects, which have an owner
    that they end with."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(key, value, overwrite=True, namespace=_KV_NAMESPACE)


def kv_get(key: bytes) -> bytes | None:
    """What `kv_put` left; None where there is nothing."""
    from ray.experimental import internal_kv

    found: bytes | None = internal_kv._internal_kv_get(key, namespace=_KV_NAMESPACE)
    return found


def kv_delete(key: bytes) -> None:
    """Removes what `kv_put` left."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_del(key, namespace=_KV_NAMESPACE)
