"""Where a client finds its driver's socket, and how it introduces itself."""

from __future__ import annotations

import os
import socket

from rayllm.engine.address import DriverAddress
from rayllm.errors import EngineUnreachableError
from rayllm.executor.channel import Address

DRIVER = "the engine's driver"
"""What errors call the other end."""


def endpoint(address: DriverAddress) -> Address:
    """The Unix socket where it can be seen from here, else TCP. Raises `EngineUnreachableError`."""
    if os.path.exists(address.unix_path):
        return address.unix_path
    if address.host is not None and address.port is not None:
        return address.host, address.port
    raise EngineUnreachableError(
        f"the driver on node {address.node_id[:8]} listens at {address.unix_path}, which does not exist on this node: "
        "the driver has ended, or this process is on another node and must ask for its address again"
    )


def client_name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"
