"""Notices that a driver is lost: by Ray, by its process, by its silence, or by its node."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from rayllm.engine.client.named_connection import connect_by_name
from rayllm.engine.owner.driver_handle import DriverHandle
from rayllm.errors import EngineError
from rayllm.executor.ray_connection import ray_is_initialized
from rayllm.executor.worker_process import WorkerPlace, death_reason, is_stopped, kill_process

_LOOK_PERIOD_S = 0.5
_ASK_PERIOD_S = 5.0
_MAX_SILENCE_S = 30.0
"""A driver answers between and during steps: only a machine that is far too busy lets it take seconds."""


class DriverWatch:
    """Over one driver of the engine of that name."""

    def __init__(self, running: DriverHandle, name: str):
        self._running = running
        self._driver: Any = running.driver
        self._name = name

    async def wait_failed(self) -> str:
        """Returns once the driver has failed, died or fallen silent, or its node is lost, with the reason. One that is
        silent is killed: it would not hear Ray."""
        signs = (self._reported(), self._stopped(), self._silent(), self._node_lost())
        watches = [asyncio.ensure_future(sign) for sign in signs]
        try:
            await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            return next(watch.result() for watch in watches if watch.done())
        finally:
            for watch in watches:
                watch.cancel()

    async def _reported(self) -> str:
        import ray

        try:
            return str(await self._driver.wait_failed.remote())
        except ray.exceptions.RayActorError as error:
            return f"its driver died: {death_reason(error)}"

    async def _stopped(self) -> str:
        """Returns where the driver's process, on this node, is stopped at two looks."""
        place = await self._place()
        if not _is_local(place):
            await asyncio.Event().wait()
        num_looks = 0
        while num_looks < 2:
            await asyncio.sleep(_LOOK_PERIOD_S)
            num_looks = num_looks + 1 if is_stopped(place) else 0
        kill_process(place)
        return "its driver's process was stopped"

    async def _silent(self) -> str:
        """Returns where the driver does not answer its clients, though its process is there."""
        import ray

        place = await self._place()
        try:
            async with await connect_by_name(self._name, name="owner") as connection:
                while True:
                    await connection.stats(_MAX_SILENCE_S)
                    await asyncio.sleep(_ASK_PERIOD_S)
        except Exception as error:
            if not isinstance(error, EngineError) or error.code != "engine_timeout":
                await asyncio.Event().wait()  # it is lost, which Ray or its node will tell
        if _is_local(place):
            kill_process(place)
        else:
            ray.kill(self._driver, no_restart=True)
        return f"its driver did not answer for {_MAX_SILENCE_S:g} s"

    async def _node_lost(self) -> str:
        """Returns where the driver's node, which is another, is lost: Ray would notice much later."""
        while True:
            with contextlib.suppress(Exception):  # Ray does not answer just now
                if not ray_is_initialized():  # it would be started for whoever asks
                    await asyncio.Event().wait()
                if await asyncio.to_thread(self._running.is_local):
                    await asyncio.Event().wait()
                if lost := await asyncio.to_thread(self._running.why_lost):
                    return f"its driver is lost: {lost}"
            await asyncio.sleep(_LOOK_PERIOD_S)

    async def _place(self) -> WorkerPlace:
        """Where the driver runs. Waits for ever where it is lost."""
        import ray

        try:
            place: WorkerPlace = (await self._driver.describe.remote()).driver
        except ray.exceptions.RayError:
            await asyncio.Event().wait()
        return place


def _is_local(place: WorkerPlace) -> bool:
    import ray

    return bool(place.node_id == ray.get_runtime_context().get_node_id())
