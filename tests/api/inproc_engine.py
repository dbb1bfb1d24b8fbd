"""A real engine in this process, as the API sees it: it computes while a stream is waited for."""

from __future__ import annotations

import asyncio

from rayllm.config import EngineConfig
from rayllm.engine.owner.local import LocalEngine
from rayllm.engine.owner.resolve import resolve
from rayllm.executor.inproc import InprocExecutor
from rayllm.messages import EngineStats, TokenDelta
from rayllm.request import Request


class InprocStream:
    def __init__(self, engine: LocalEngine, first: int, request: Request):
        self._engine = engine
        self._first = first
        self._num_open = request.params.n
        engine.submit(first, request)

    def __aiter__(self) -> InprocStream:
        return self

    async def __anext__(self) -> list[TokenDelta]:
        await asyncio.sleep(0)
        if not self._num_open:
            raise StopAsyncIteration
        deltas = [delta for delta in self._engine.receive() if delta.stream >= self._first]
        self._num_open -= sum(delta.finish is not None for delta in deltas)
        return deltas

    def abort_choice(self, choice: int) -> None:
        self._engine.abort(self._first + choice)

    def close(self) -> None:
        while self._num_open:
            self._num_open -= 1
            self.abort_choice(self._num_open)


class InprocClient:
    """One request at a time."""

    def __init__(self, path: str):
        self.config = resolve(EngineConfig(model=path, distributed_executor_backend="inproc", device="cpu"))
        self.engine = LocalEngine(self.config, InprocExecutor.load(self.config))
        self._num_streams = 0

    def submit(self, request: Request) -> InprocStream:
        first, self._num_streams = self._num_streams, self._num_streams + request.params.n
        return InprocStream(self.engine, first, request)

    async def adopt(self, client_key: str, answer_id: str, takes_over: bool = True) -> None:
        """It keeps nothing."""

    def forget(self, client_key: str, answer_id: str) -> None:
        pass

    async def stats(self) -> EngineStats:
        return self.engine.stats()
