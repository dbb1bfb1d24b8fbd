"""A client that goes, seen from the engine: the real loop and scheduler behind the real sockets, step by step."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from api.fake_engine import config
from fakes import FakeExecutor
from serve.served import completion, tokenizer

from rayllm.api.service import ModelService
from rayllm.engine.client import connect
from rayllm.engine.journal import JournaledEngine
from rayllm.engine.link import ClientGone, ClientLink, DriverAddress
from rayllm.engine.local import build_scheduler
from rayllm.engine.loop import EngineLoop
from rayllm.messages import Abort, Submit
from rayllm.serve.app import create_app


class _Engine:
    """A driver whose thread is the test: nothing happens but in `hear` and `step`."""

    def __init__(self) -> None:
        self.link = ClientLink()
        executor = FakeExecutor(num_blocks=64)
        self.config = config(max_num_seqs=1, max_num_batched_tokens=16)
        self.scheduler = build_scheduler(self.config, executor.num_blocks)
        self.loop = EngineLoop(self.config, self.scheduler, executor, self.link.send)

    async def hear(self, kind: type[Any]) -> None:
        """Takes messages until one of that kind has come."""
        for _ in range(1000):
            for client, event in self.link.drain():
                assert not isinstance(event, ClientGone)
                self.loop.submit(client, event)
                if isinstance(event, kind):
                    return
            await asyncio.sleep(0.005)
        raise AssertionError(f"no {kind.__name__} came")

    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            assert self.loop.step()


class _Client:
    """One HTTP request, whose connection the test cuts."""

    def __init__(self, app: Any, body: dict[str, Any]):
        self._messages = asyncio.Queue[dict[str, Any]]()
        self._messages.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
        self.done = asyncio.create_task(app(scope, self._messages.get, self._send))

    async def _send(self, message: Any) -> None:
        await asyncio.sleep(0)

    def go(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})


@pytest.fixture
async def engine() -> AsyncIterator[_Engine]:
    engine = _Engine()
    yield engine
    engine.link.close()


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("stage", ["queued", "prefill", "decode"])
async def test_the_kv_of_a_client_that_goes_is_free_before_the_next_step(
    engine: _Engine, stage: str, streams: bool
) -> None:
    client = JournaledEngine()
    service = ModelService()
    async with await connect(DriverAddress("node", engine.link.unix_path, engine.link.token)) as connection:
        client.attach(connection)
        service.set_ready(engine.config, tokenizer(), client)
        app = create_app(service)
        if stage == "queued":  # there is one row, and it is taken
            other = _Client(app, completion(prompt=[7] * 20, ignore_eos=True, max_tokens=90))
            await engine.hear(Submit)
            engine.step(4)
        num_used = engine.scheduler.num_blocks_used
        prompt = list(range(10, 50))
        gone = _Client(app, completion(prompt=prompt, stream=streams, ignore_eos=True, max_tokens=80))
        await engine.hear(Submit)
        engine.step({"queued": 4, "prefill": 2, "decode": 12}[stage])
        assert engine.scheduler.num_waiting == (stage == "queued")
        assert (engine.scheduler.num_blocks_used > num_used) == (stage != "queued")

        gone.go()
        await engine.hear(Abort)

        assert engine.scheduler.num_blocks_used == num_used if stage == "queued" else not engine.scheduler.has_work
        assert engine.scheduler.num_waiting == 0
        await gone.done
        if stage == "queued":
            other.go()
            await engine.hear(Abort)
            await other.done
        assert engine.scheduler.num_blocks_used == 0
