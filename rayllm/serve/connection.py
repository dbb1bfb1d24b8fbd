"""Connecting to a driver from inside a Serve replica, whose event loop is uvloop's."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from rayllm.engine.client import CONNECT_TIMEOUT_S, EngineConnection, _Wire
from rayllm.engine.driver import find_address


class _AnyLoopWire(_Wire):
    """uvloop's transports are no subclass of `asyncio.Transport`, which `_Wire` asserts; they do the same things."""

    def connection_made(self, transport: Any) -> None:
        self.transport = cast(asyncio.Transport, transport)


async def connect_from_replica(engine_name: str, client_name: str) -> EngineConnection:
    """`engine.client.connect_by_name` on any event loop. Raises `EngineUnreachableError`."""
    address = await find_address(engine_name)
    connection = EngineConnection()
    connection._wire = _AnyLoopWire(connection._take, connection._lost)
    await connection._open(address, client_name, CONNECT_TIMEOUT_S)
    return connection
