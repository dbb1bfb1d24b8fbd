"""How clients reach a driver: the contract between the driver's sockets and its clients'."""

from __future__ import annotations

from dataclasses import dataclass

MAX_CLIENT_FRAME_BYTES = 64 * 2**20
"""A longer frame is refused on both sides."""


@dataclass(frozen=True)
class DriverAddress:
    """Where a driver accepts clients. `host` and `port` are None while it listens on its own node only."""

    node_id: str
    unix_path: str
    token: str
    host: str | None = None
    port: int | None = None
