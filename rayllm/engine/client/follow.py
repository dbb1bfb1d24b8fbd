"""Leaves a driver on another node that has fallen silent, once the engine has another driver."""

from __future__ import annotations

import asyncio
import contextlib

from rayllm.engine.client.connection import EngineConnection
from rayllm.engine.discovery import find_address
from rayllm.errors import EngineError, EngineUnreachableError

_LOOK_PERIOD_S = 1.0
_SILENCE_S = 2.0


async def leave_when_replaced(connection: EngineConnection, token: str, engine: str, namespace: str) -> None:
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
