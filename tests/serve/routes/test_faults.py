"""Fault injection over HTTP: off by default, for this server's own pages and for whoever has the key."""

from __future__ import annotations

from typing import Any

import pytest
from serve.served import KEY, Served

from rayllm.config import EngineConfig
from rayllm.engine.driver.fault_injection import KilledWorker
from rayllm.errors import EngineError
from rayllm.executor.worker_process import WorkerPlace

PATH = "/admin/kill_worker"


class Killer:
    def __init__(self) -> None:
        self.ranks: list[int] = []

    async def __call__(self, rank: int) -> KilledWorker:
        self.ranks.append(rank)
        return KilledWorker(rank, WorkerPlace(4700 + rank, "n" * 56, "10.0.0.1", ("cpu",), "/logs/worker.err"))


def served(killer: Killer | None, **options: Any) -> Served:
    made = Served(ready=False, kill_worker=killer, **options)
    made.make_ready(engine=EngineConfig(tensor_parallel_size=2))
    return made


async def test_fault_injection_is_off_unless_the_server_was_started_with_it() -> None:
    async with served(None).client() as client:
        refused = await client.post(PATH, json={"rank": 0})
        state = (await client.get("/dashboard/state")).json()
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "fault_injection_disabled"
    assert "--enable-fault-injection" in refused.json()["error"]["message"]
    assert state["fault_injection"] is False


async def test_it_kills_the_rank_that_is_named_or_any() -> None:
    killer = Killer()
    async with served(killer).client() as client:
        named = await client.post(PATH, json={"rank": 1})
        for _ in range(40):
            assert (await client.post(PATH, json={})).status_code == 200
        state = (await client.get("/dashboard/state")).json()
    assert named.json() == {"object": "worker.killed", "rank": 1, "pid": 4701, "host": "10.0.0.1"}
    assert killer.ranks[0] == 1
    assert set(killer.ranks[1:]) == {0, 1}
    assert state["fault_injection"] is True


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"rank": 2}, "rank=2 must be an integer from 0 to 1"),
        ({"rank": -1}, "rank=-1 must be"),
        ({"rank": True}, "rank=True must be"),
        ({"rank": "0"}, "rank='0' must be"),
        ({"rank": 0.0}, "rank=0.0 must be"),
        ({"rnk": 0}, "unknown field 'rnk'; did you mean 'rank'?"),
        ([0], "object"),
    ],
)
async def test_what_names_no_rank_kills_nothing(body: Any, said: str) -> None:
    killer = Killer()
    async with served(killer).client() as client:
        refused = await client.post(PATH, json=body)
    assert (refused.status_code, killer.ranks) == (400, [])
    assert said in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://served:81"},
        {"origin": "http://friend.example"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "origin": "http://served"},
    ],
)
async def test_pages_of_other_origins_kill_nothing_whatever_origins_are_allowed(headers: dict[str, str]) -> None:
    killer = Killer()
    async with served(killer, allowed_origins=["http://friend.example"]).client() as client:
        refused = await client.post(PATH, json={}, headers=headers)
    assert (refused.status_code, killer.ranks) == (403, [])
    assert refused.json()["error"]["message"]


async def test_its_own_page_may() -> None:
    killer = Killer()
    headers = {"origin": "http://served", "sec-fetch-site": "same-origin"}
    async with served(killer).client(**headers) as client:
        assert (await client.post(PATH, json={"rank": 0})).status_code == 200
    assert killer.ranks == [0]


async def test_a_form_is_no_body() -> None:
    killer = Killer()
    async with served(killer).client() as client:
        refused = await client.post(PATH, content=b"{}", headers={"content-type": "text/plain"})
    assert (refused.status_code, killer.ranks) == (415, [])


async def test_it_asks_for_the_key() -> None:
    killer = Killer()
    async with served(killer, api_keys=[KEY]).client() as client:
        assert (await client.post(PATH, json={})).status_code == 401
        assert (await client.post(PATH, json={}, headers={"authorization": f"Bearer {KEY}"})).status_code == 200
    assert len(killer.ranks) == 1


async def test_a_rank_that_is_being_replaced_is_said_to_be() -> None:
    class Gone(Killer):
        async def __call__(self, rank: int) -> KilledWorker:
            raise EngineError(f"worker rank {rank} is being replaced already: try again", code="worker_not_running")

    async with served(Gone()).client() as client:
        refused = await client.post(PATH, json={"rank": 0})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "worker_not_running")
    assert refused.headers["retry-after"] == "1"
