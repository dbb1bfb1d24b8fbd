"""A client that goes, seen from the engine: the real loop and scheduler behind the real sockets, step by step."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from api.fake_engine import config
from fakes import FakeExecutor
from serve.served import completion, tokenizer

from rayllm.api.service import ModelService
from rayllm.engine.address import DriverAddress
from rayllm.engine.client.driver_connection import connect
from rayllm.engine.client.journaled_client import JournaledClient
from rayllm.engine.driver.link import ClientGone, ClientLink
from rayllm.engine.driver.loop import EngineLoop
from rayllm.engine.owner.local import build_scheduler
from rayllm.messages import Abort, Submit
from rayllm.serve.app import create_app


class _Engine:
    """A driver whose thread is the test: nothing happens but in `hear` and `step`."""

    def __init__(self, max_num_seqs: int) -> None:
        self.link = ClientLink()
        executor = FakeExecutor(num_blocks=64)
        self.config = config(max_num_seqs=max_num_seqs, max_num_batched_tokens=16)
        self.scheduler = build_scheduler(self.config, executor.num_blocks)
        self.loop = EngineLoop(self.config, self.scheduler, executor, self.link.send)

    async def take(self) -> list[Any]:
        """The messages that are there, given to the loop."""
        await asyncio.sleep(0.002)
        events = self.link.drain()
        for client, event in events:
            assert not isinstance(event, ClientGone)
            self.loop.submit(client, event)
        return [event for _, event in events]

    async def hear(self, kind: type[Any]) -> None:
        """Takes messages until one of that kind has come."""
        for _ in range(1000):
            if any(isinstance(event, kind) for event in await self.take()):
                return
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

        self.status = 0

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)

    def go(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})


@contextlib.asynccontextmanager
async def _served(max_num_seqs: int) -> AsyncIterator[tuple[_Engine, Any]]:
    engine, client, service = _Engine(max_num_seqs), JournaledClient(), ModelService()
    try:
        async with await connect(DriverAddress("node", engine.link.unix_path, engine.link.token)) as connection:
            client.attach(connection)
            service.set_ready(engine.config, tokenizer(), client)
            yield engine, create_app(service)
    finally:
        engine.link.close()


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("stage", ["queued", "prefill", "decode"])
async def test_the_kv_of_a_client_that_goes_is_free_before_the_next_step(stage: str, streams: bool) -> None:
    async with _served(max_num_seqs=1) as (engine, app):
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


async def test_a_storm_of_cancelled_requests_leaves_the_pool_as_it_was_and_the_server_answers() -> None:
    dice = random.Random(7)
    async with _served(max_num_seqs=8) as (engine, app):
        base = engine.scheduler.num_blocks_used
        clients: list[_Client] = []
        for number in range(200):
            prompt = [dice.randrange(3, 280) for _ in range(dice.randrange(1, 60))]
            body = completion(prompt=prompt, stream=bool(number % 2), n=1 + number % 3, ignore_eos=True, max_tokens=60)
            clients.append(_Client(app, body))
            await engine.take()
            for _ in range(dice.randrange(4)):
                engine.loop.step()
            if len(clients) > 12:
                clients.pop(dice.randrange(len(clients))).go()
        for client in clients:
            client.go()
        while engine.scheduler.has_work or not all(client.done.done() for client in clients):
            await engine.take()

        engine.scheduler.check()
        assert engine.scheduler.num_blocks_used == base
        last = _Client(app, completion(prompt=[5, 6], ignore_eos=True, max_tokens=9))
        while not last.done.done():
            await engine.take()
            engine.loop.step()
        assert last.status == 200
