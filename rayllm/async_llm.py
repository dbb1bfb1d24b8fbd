"""`AsyncLLM`: a model for one asyncio program."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from rayllm.async_engine import AsyncEngine
from rayllm.engine.owner.attachments import LocalDriver, OwnedDrivers
from rayllm.engine.owner.program import finalizer, program_config, resolve_for_program, start_watched
from rayllm.engine.owner.watched import while_ray_lives
from rayllm.executor.ray_cluster import connected_ray


class AsyncLLM(AsyncEngine):
    """`LLM` for asyncio programs: many requests at once, each an async iterator. Settings are the same.

    The constructor returns when the engine is ready; `await close()` ends it with every process it started.
    """

    def __init__(self, model: str = "", **settings: Any):
        config = resolve_for_program(program_config(model, settings))
        with contextlib.ExitStack() as cleanup:
            if config.backend == "ray":
                cleanup.enter_context(connected_ray(num_cpus=1 + config.engine.layout.num_ranks))
                owned = start_watched(config, cleanup).owned
                keep_attached = while_ray_lives(lambda engine: OwnedDrivers(owned).keep_attached(engine))
                super().__init__(owned.config, keep_attached)
            else:
                local = LocalDriver(config)
                cleanup.callback(local.driver.close)
                super().__init__(local.config, local.keep_attached)
            self.get_tokenizer()
            self._ends = finalizer(self, cleanup.pop_all())

    async def close(self) -> None:
        await super().close()
        await asyncio.to_thread(self._ends)
