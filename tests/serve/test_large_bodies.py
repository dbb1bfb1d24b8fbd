"""Large and heavy requests: refused by size, few at a time, and none keeps the event loop for long."""

from __future__ import annotations

import asyncio
import gc
import itertools
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from api.fake_engine import FakeEngine, FakeStream
from badinput.large_bodies import LARGE_BODIES, MESSAGE, body_of
from serve.served import Served, tokenizer

from rayllm.api.body import MAX_CONTAINERS, MAX_NAMES, MAX_STRINGS, max_body_bytes
from rayllm.api.offload import SWITCH_INTERVAL_S
from rayllm.request import Request
from rayllm.serve import body_reader

LONGEST_TURN_S = 0.15
"""Of CPU time, of all threads together, between two turns of a task that only waits. What the loop may be kept waiting
is 0.05 s of an idle machine's time; what this process computes meanwhile, and caches that others use, come on top."""
_LIMIT = max_body_bytes(128, 288)


@pytest.fixture(autouse=True, scope="module")
def shared_interpreter() -> Iterator[None]:
    """As an ingress sets itself up."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    sys.setswitchinterval(interval_s)


async def in_pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 2**16):
        yield body[start : start + 2**16]
        await asyncio.sleep(0)


async def post(client: httpx.AsyncClient, route: str, body: bytes) -> httpx.Response:
    return await client.post(route, content=in_pieces(body), headers={"content-type": "application/json"})


async def longest_turn_s(work: asyncio.Task[Any]) -> float:
    """The longest that another task did not get its turn while this process was computing."""
    longest_s = 0.0
    while not work.done():
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        await asyncio.sleep(0.001)
        longest_s = max(longest_s, min(time.perf_counter() - began_s, time.process_time() - began_cpu_s))
    return longest_s


@pytest.mark.parametrize("name", LARGE_BODIES)
async def test_no_request_keeps_others_waiting(name: str) -> None:
    route, body, status = LARGE_BODIES[name]
    async with Served().client() as client:
        await client.get("/health")
        work = asyncio.create_task(post(client, route, body))
        longest_s = await longest_turn_s(work)
    answer = work.result()

    assert answer.status_code == status, answer.text[:300]
    assert longest_s < LONGEST_TURN_S
    if status == 413:
        assert answer.json()["error"]["code"] == "body_too_large"
        assert "at most" in answer.json()["error"]["message"]


class Turns:
    """Counts the turns of the event loop, and what happens in each."""

    def __init__(self) -> None:
        self._number = 0
        self._happened: Counter[tuple[str, int]] = Counter()

    def note(self, what: str, count: int = 1) -> None:
        self._happened[what, self._number] += count

    async def count(self) -> None:
        while True:
            await asyncio.sleep(0)
            self._number += 1

    def most(self, what: str) -> int:
        """The most of it in one turn."""
        return max((count for (name, _), count in self._happened.items() if name == what), default=0)


class NotedEngine(FakeEngine):
    """Notes in which turn of the event loop a choice is submitted, first asked for, and closed; a few choices have
    news in each step, as where the engine runs a bounded number of sequences."""

    def __init__(self) -> None:
        super().__init__(lambda request, choice: [20, 21, 2])
        self.turns = Turns()
        self._pauses = itertools.count()

    def submit(self, request: Request) -> FakeStream:
        self.turns.note("submitted", request.params.n)
        stream = super().submit(request)
        noted = stream.close

        def close() -> None:
            self.turns.note("closed", request.params.n)
            noted()

        stream.close = close  # type: ignore[method-assign]
        return stream

    async def pause(self, num_steps: int) -> None:
        if num_steps == 0:
            self.turns.note("asked for")
        await asyncio.sleep(0.001 * (next(self._pauses) % 32))
        await super().pause(num_steps)


@pytest.fixture
async def noted() -> AsyncIterator[Served]:
    """A server with a `NotedEngine`."""
    served = Served()
    served.engine = NotedEngine()
    served.make_ready()
    counting = asyncio.create_task(served.engine.turns.count())
    yield served
    counting.cancel()


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ["ab"] * 2048},
        {"prompt": ["ab"] * 32, "n": 128},
        {"prompt": ["ab"] * 1024, "n": 4, "stream": True},
        {"prompt": ["ab"] * 512, "n": 2, "best_of": 8},
    ],
)
async def test_many_choices_are_opened_and_closed_a_part_at_a_time(noted: Served, fields: dict[str, Any]) -> None:
    async with noted.client() as client:
        answer = await post(client, "/v1/completions", body_of(max_tokens=2, **fields))
    turns = noted.engine.turns  # type: ignore[attr-defined]
    assert answer.status_code == 200
    assert len(noted.engine.streams) == len(fields["prompt"])
    for what in ("submitted", "asked for", "closed"):
        assert 0 < turns.most(what) <= 128, what
    if "stream" not in fields:
        num_choices = len(fields["prompt"]) * fields.get("n", 1)
        assert [choice["index"] for choice in answer.json()["choices"]] == list(range(num_choices))


@pytest.mark.parametrize("num_prompts", [1, 2048])
async def test_choices_whose_client_is_gone_are_all_aborted(noted: Served, num_prompts: int) -> None:
    noted.engine.stall_at = 1
    async with noted.client() as client:
        work = asyncio.create_task(post(client, "/v1/completions", body_of(prompt=["ab"] * num_prompts, max_tokens=3)))
        await noted.engine.stalled.wait()
        work.cancel()
        await asyncio.wait([work])
        while not all(stream.closed for stream in noted.engine.streams):
            await asyncio.sleep(0)
    assert noted.engine.turns.most("closed") <= 128  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("route", "fields", "status"),
    [
        ("/tokenize", {"prompt": "hello you " * 20_000}, 200),
        ("/v1/completions", {"prompt": "hello you " * 20_000}, 400),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello <|im_end|> " * 8_000}]}, 400),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hello you " * 20_000}]}, 200),
        ("/v1/chat/completions", {"messages": [MESSAGE] * 2000, "max_tokens": 1}, 200),
    ],
)
async def test_a_long_prompt_is_tokenized_beside_the_loop(route: str, fields: dict[str, Any], status: int) -> None:
    served = Served()
    served.make_ready(max_model_len=40_000)
    async with served.client() as client:
        work = asyncio.create_task(post(client, route, body_of(**fields)))
        num_turns = 0
        while not work.done():
            await asyncio.sleep(0.001)
            num_turns += 1
    assert work.result().status_code == status, work.result().text[:300]
    assert num_turns > 5  # the loop would have had one


async def test_a_body_beyond_what_the_model_can_use_is_refused_by_its_size() -> None:
    assert max_body_bytes(128, 288) < max_body_bytes(10**6, 288) < max_body_bytes(10**6, 10**40)
    body = b'{"model": "tiny", "prompt": "' + b" " * _LIMIT + b'"}'
    async with Served().client() as client:
        told = await client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        untold = await post(client, "/v1/completions", body)
    for answer in (told, untold):
        assert answer.status_code == 413
        assert str(_LIMIT) in answer.json()["error"]["message"]
    assert str(len(body)) in told.json()["error"]["message"]


async def test_what_stands_in_texts_is_not_counted() -> None:
    served = Served()
    served.make_ready(max_model_len=400_000)
    text = '\\"[{:,' * 20_000
    fields = {"prompt": text, "max_tokens": 1}
    assert text.count("[") + text.count("{") > MAX_CONTAINERS
    assert text.count('"') < 2 * MAX_STRINGS
    assert text.count(":") < MAX_NAMES
    async with served.client() as client:
        answer = await post(client, "/v1/completions", body_of(**fields))
    assert answer.status_code == 200, answer.text[:300]
    assert tokenizer().decode(list(served.engine.requests[0].prompt_token_ids)) == text


async def test_what_all_bodies_hold_together_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_reader, "MAX_HELD_BYTES", 200_000)
    go_on = asyncio.Event()
    body = body_of(prompt="hi", user="x" * 200_000)

    async def slowly() -> AsyncIterator[bytes]:
        yield body[:150_000]
        yield body[150_000:-1]
        await go_on.wait()
        yield body[-1:]

    headers = {"content-type": "application/json", "transfer-encoding": "chunked"}
    async with Served().client() as client:
        first = asyncio.create_task(client.post("/v1/completions", content=slowly(), headers=headers))
        second = asyncio.create_task(client.post("/v1/completions", content=slowly(), headers=headers))
        while not second.done() and not first.done():
            await asyncio.sleep(0.001)
        go_on.set()
        answers = [await first, await second]
        third = await post(client, "/v1/completions", body)
    assert sorted(answer.status_code for answer in answers) == [200, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "bodies_too_large"
    assert third.status_code == 200


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
        (None, 200),
        ("text/plain", 415),
        ("text/plain; application/json", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("", 415),
        ("json", 415),
    ],
)
async def test_json_says_that_it_isbody_of(content_type: str | None, status: int) -> None:
    bodies = {
        "/v1/completions": body_of(prompt="hi"),
        "/v1/chat/completions": body_of(messages=[MESSAGE]),
        "/v1/responses": body_of(input="hi"),
        "/v1/messages": body_of(messages=[MESSAGE], max_tokens=4),
        "/tokenize": body_of(prompt="hi"),
    }
    headers = {} if content_type is None else {"content-type": content_type}
    async with Served().client() as client:
        for route, body in bodies.items():
            answer = await client.post(route, content=body, headers=headers)
            assert answer.status_code == status
            if status == 415:
                assert answer.json()["error"]["code"] == "unsupported_media_type"
                assert "-H 'Content-Type: application/json'" in answer.json()["error"]["message"]
