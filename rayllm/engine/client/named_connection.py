"""A connection to the driver of a named engine; one on another node that stops answering is closed once the engine has
another driver."""

from __future__ import annotations

import asyncio
import contextlib

from rayllm.config import RAY_NAMESPACE
from rayllm.engine.client.driver_connection import DriverConnection, connect
from rayllm.engine.discovery import find_address
from rayllm.errors import EngineError, EngineUnreachableError

_LOOK_PERIOD_S = 1.0
_SILENCE_S = 2.0


async def connect_by_name(engine: str, *, name: str | None = None, namespace: str = RAY_NAMESPACE) -> DriverConnection:
    """Connects to the engine of that name in this process's Ray cluster. Raises `EngineUnreachableError`."""
    import ray

    address = await find_address(engine, namespace)
    connection = await connect(address, name=name)
    if address.node_id != ray.get_runtime_context().get_node_id():
        watcher = asyncio.create_task(leave_when_replaced(connection, address.token, engine, namespace))
        connection.on_close(watcher.cancel)  # which also holds the task
    return connection


async def leave_when_replaced(connection: DriverConnection, token: str, engine: str, namespace: str) -> None:
    """Closes the connection to the driver of that `token` where it does not answer and is no longer the engine's: the
    connection to a node that froze, or cannot be reached any more, does not end by itself."""
    while connection.lost_reason is None:
        await asyncio.sleep(_LOOK_PERIOD_S)
        try:
            await connection.stats(_SILENCE_S)
            continue
        except EngineError as error:
            if error.code != "engine_timeout":
                return
        with contextlib.suppress(EngineUnreachableError):  # there is none yet
            if (await find_address(engine, namespace)).token != token:
                connection.close("it does not answer, and the engine has another driver")
