"""The private names of Serve that RayLLM uses, read in Ray 2.60; no other module names any
(tests/test_private_names.py).

The sockets that Serve opens in a replica have no settings:

- Its gRPC port, for calls between deployments, listens on all interfaces. Where the whole cluster is one machine, it
  listens on loopback. Our deployments make no such calls.
- Behind HAProxy, its HTTP port's connections let the kernel hold megabytes for a client that does not read. They get a
  small send buffer, so that the ingress notices after kilobytes.

Where a version of Ray has no function of that name, nothing is changed, and the tests that scan the listeners and stall
a reader fail.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

from rayllm.config import Environment

_SEND_BUFFER_BYTES = 16 * 1024


def serve_address() -> tuple[str, int]:
    """Host and port at which Serve's proxy in this cluster listens. Serve has no public way to ask."""
    from ray.serve.context import _get_global_client

    options = _get_global_client().http_config
    return options.host, options.port


def prepare_replica_sockets() -> None:
    """Call it in a replica's constructor, which Serve runs before it opens the ports."""
    from ray.serve._private import replica

    if Environment.ray_is_loopback_only():
        _wrap(replica, "add_port_to_grpc_server", _on_loopback)
    _wrap(replica, "start_asgi_http_server", _with_small_send_buffers)


def _wrap(module: Any, name: str, wrapper: Any) -> None:
    function = getattr(module, name, None)
    if function is None or hasattr(function, "is_ours"):
        return
    wrapped = wrapper(function)
    wrapped.is_ours = True
    setattr(module, name, wrapped)


def _on_loopback(add_port: Any) -> Any:
    def add_loopback_port(server: Any, address: str) -> Any:
        return add_port(server, address.replace("[::]", "127.0.0.1"))

    return add_loopback_port


def _with_small_send_buffers(start: Any) -> Any:
    async def start_with_small_send_buffers(*args: Any, **kwargs: Any) -> Any:
        task, server = await start(*args, **kwargs)
        startup = server.startup  # of uvicorn; not called yet: the task has not run

        async def startup_with_small_send_buffers(sockets: Sequence[socket.socket] | None = None) -> None:
            for listener in sockets or ():
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)  # connections inherit it
            await startup(sockets=sockets)

        server.startup = startup_with_small_send_buffers
        return task, server

    return start_with_small_send_buffers
