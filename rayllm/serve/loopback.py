"""Keeps the last of Serve's ports on loopback, where the whole cluster is one machine.

Each Serve replica opens a gRPC port for calls between deployments on all interfaces, and Serve has no setting for it.
Our deployments make no such calls. This is the only place that touches a private name of Serve's; where a version of
Ray has no such name, nothing happens, and the test that scans the listeners says so.
"""

from __future__ import annotations

from typing import Any

from rayllm.config import Environment


def keep_replica_on_loopback() -> None:
    """Call it in a replica's constructor, which Serve runs before it opens the port."""
    if not Environment.ray_is_loopback_only():
        return
    from ray.serve._private import replica

    add_port = getattr(replica, "add_port_to_grpc_server", None)
    if add_port is None or hasattr(add_port, "on_loopback"):
        return

    def add_loopback_port(server: Any, address: str) -> Any:
        return add_port(server, address.replace("[::]", "127.0.0.1"))

    add_loopback_port.on_loopback = True  # type: ignore[attr-defined]
    replica.add_port_to_grpc_server = add_loopback_port
