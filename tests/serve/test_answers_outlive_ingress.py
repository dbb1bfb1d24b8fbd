"""An ingress dies in the middle of a stream, and another gives the rest: the same events with the same numbers.

Everything is real but Ray: a driver with its sockets, a tiny model, and the applications of two ingresses."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from tiny import make_checkpoint

from rayllm.api.service import ModelService
from rayllm.config import EngineConfig, ResolvedConfig
from rayllm.engine.client.driver_connection import DriverConnection, connect
from rayllm.engine.client.journaled_client import JournaledClient
from rayllm.engine.driver.actor import Driver
from rayllm.engine.owner.resolve import resolve
from rayllm.executor.inproc import InprocExecutor
from rayllm.serve.app import create_app
from rayllm.text.tokenizer import Tokenizer

_SAMPLED = {"model": "tiny", "temperature": 1.0, "seed": 7, "ignore_eos": True}
_MESSAGES = [{"role": "user", "content": "Once upon a time"}]
_RESUMABLE = {"x-rayllm-resume": "true"}
CHAT = ("/v1/chat/completions", {**_SAMPLED, "messages": _MESSAGES, "max_tokens": 30, "stream": True})
STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": CHAT,
    "choices": (
        CHAT[0],
        {
            **CHAT[1],
            "n": 3,
            "max_tokens": 12,
            "logprobs": True,
            "top_logprobs": 2,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    ),
    "stop": (
        "/v1/completions",
        {**_SAMPLED, "prompt": "hello", "max_tokens": 30, "stop": ["zzzz", "e"], "n": 2, "stream": True},
    ),
    "messages": (
        "/v1/messages",
        {**_SAMPLED, "messages": _MESSAGES, "max_tokens": 20, "stream": True},
    ),
    "responses": (
        "/v1/responses",
        {**_SAMPLED, "input": "Once upon a time", "max_output_tokens": 20, "stream": True},
    ),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ResolvedConfig:
    path = make_checkpoint(tmp_path_factory.mktemp("tiny"))
    return resolve(
        EngineConfig(
            model=str(path),
            served_model_name="tiny",
            distributed_executor_backend="inproc",
            device="cpu",
            dtype="float32",
            enable_prefix_caching=False,
        )
    )


@pytest.fixture(scope="module")
def driver(config: ResolvedConfig) -> Iterator[Driver]:
    driver = _start_driver(config)
    yield driver
    driver.close()


def _start_driver(config: ResolvedConfig) -> Driver:
    driver = Driver(lambda config, on_stage: InprocExecutor.load(config))
    driver.start(config)
    return driver


class _Ingress:
    """One ingress's application, and its connection to a driver."""

    def __init__(self, config: ResolvedConfig):
        self._config = config
        self.service = ModelService()
        self.engine = JournaledClient()
        self.app = create_app(self.service)
        self.service.set_ready(config, Tokenizer.from_path(config.tokenizer_path), self.engine)
        self.connection: DriverConnection | None = None

    async def attach(self, driver: Driver) -> None:
        self.connection = await connect(driver.address())
        self.engine.attach(self.connection)

    def lose_driver(self) -> None:
        assert self.connection is not None
        self.engine.detach("killed by the test")
        self.connection.close()

    def die(self) -> None:
        """The process is gone: its socket closes, and nothing of what it holds is said to anybody."""
        assert self.connection is not None
        self.connection.close()
        self.engine.driver = None

    async def read(
        self, path: str, body: dict[str, Any], headers: dict[str, str], num_events: int | None = None
    ) -> bytes:
        """The stream, or so many of its events, after which the client is gone."""
        read = b""
        async for piece in _streamed(self.app, path, body, headers):
            read += piece
            if num_events is not None and read.count(b"\n\n") >= num_events:
                break
        return read

    async def get(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=self.app), base_url="http://ingress") as client:
            return await client.get(path)


async def _streamed(app: Any, path: str, body: dict[str, Any], headers: dict[str, str]) -> AsyncIterator[bytes]:
    data = json.dumps(body).encode()
    pieces: asyncio.Queue[bytes | None] = asyncio.Queue()
    gone = asyncio.Event()
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": data, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start" and message["status"] != 200:
            pieces.put_nowait(f"status {message['status']}: ".encode())
        if message["type"] == "http.response.body":
            pieces.put_nowait(message["body"])
            if not message.get("more_body"):
                pieces.put_nowait(None)

    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode(),
        "root_path": "", "query_string": b"", "scheme": "http", "server": ("ingress", 80), "client": ("127.0.0.1", 1),
        "asgi": {"version": "3.0"}, "state": {},
        "headers": [(b"host", b"ingress"), (b"content-type", b"application/json"),
                    (b"content-length", str(len(data)).encode()),
                    *((name.encode(), value.encode()) for name, value in headers.items())],
    }  # fmt: skip
    task = asyncio.create_task(app(scope, receive, send))
    try:
        while (piece := await pieces.get()) is not None:
            yield piece
    finally:
        gone.set()
        await task


def _events(stream: bytes) -> list[str]:
    """The events without what changes from run to run: ids and times."""
    text = re.sub(r"(chatcmpl-|cmpl-|msg_|resp_|rs_)[0-9a-f]{32}", r"\1X", stream.decode())
    text = re.sub(r'"(created|created_at|completed_at)":\d+', r'"\1":0', text)
    *events, rest = text.split("\n\n")
    assert rest == "", rest
    return events


def _told(events: list[str]) -> tuple[dict[int, list[Any]], list[float]]:
    """What each choice was told; log-probabilities apart, since a replay computes in other shapes. Where an event
    fails to follow its predecessor, that is an error."""
    told: dict[int, list[Any]] = {}
    values: dict[int, list[float]] = {}
    for number, event in enumerate(events[:-1], start=1):
        data, name = event.split("\n")
        assert name.endswith(f":{number}")
        for choice in json.loads(data.removeprefix("data: "))["choices"]:
            entries = (choice["logprobs"] or {}).get("content", ())
            tokens = [entry["token"] for entry in entries]
            told.setdefault(choice["index"], []).append((choice["delta"], tokens, choice["finish_reason"]))
            values.setdefault(choice["index"], []).extend(entry["logprob"] for entry in entries)
    return told, [value for index in sorted(values) for value in values[index]]


def _last_id(stream: bytes) -> str:
    return re.findall(r"^id: (.*)$", stream.decode(), re.MULTILINE)[-1]


async def _undisturbed(config: ResolvedConfig, driver: Driver, path: str, body: dict[str, Any]) -> list[str]:
    ingress = _Ingress(config)
    await ingress.attach(driver)
    events = _events(await ingress.read(path, body, _RESUMABLE))
    ingress.die()
    return events


@pytest.mark.parametrize("name", STREAMS)
async def test_another_ingress_goes_on_with_the_very_next_event(
    name: str, config: ResolvedConfig, driver: Driver
) -> None:
    path, body = STREAMS[name]
    expected = await _undisturbed(config, driver, path, body)
    assert len(expected) > 12
    for num_seen in (1, 4, len(expected) - 3):
        first, second = _Ingress(config), _Ingress(config)
        await first.attach(driver)
        seen = await first.read(path, body, _RESUMABLE, num_seen)
        first.die()
        await second.attach(driver)
        rest = await second.read(path, {}, {"last-event-id": _last_id(seen)})
        assert _events(seen) + _events(rest) == expected
        second.die()


async def test_a_stream_outlives_one_ingress_after_the_other(config: ResolvedConfig, driver: Driver) -> None:
    path, body = STREAMS["choices"]
    expected = await _undisturbed(config, driver, path, body)
    ingress = _Ingress(config)
    await ingress.attach(driver)
    seen = await ingress.read(path, body, _RESUMABLE, 5)
    for _ in range(3):
        ingress.die()
        ingress = _Ingress(config)
        await ingress.attach(driver)
        seen += await ingress.read(path, {}, {"last-event-id": _last_id(seen)}, 4)
    seen += await ingress.read(path, {}, {"last-event-id": _last_id(seen)})
    assert _events(seen) == expected
    ingress.die()


@pytest.mark.parametrize("name", ["chat", "choices"])
async def test_driver_and_ingress_may_die_in_turn(name: str, config: ResolvedConfig, driver: Driver) -> None:
    path, body = STREAMS[name]
    expected = await _undisturbed(config, driver, path, body)
    first, second, previous = _Ingress(config), _Ingress(config), _start_driver(config)
    await first.attach(previous)
    reading = _streamed(first.app, path, body, _RESUMABLE)
    seen = b""
    async for piece in reading:
        seen += piece
        if seen.count(b"\n\n") >= 9:
            break
    first.lose_driver()
    previous.close()
    successor = _start_driver(config)
    try:
        await first.attach(successor)
        async for piece in reading:
            seen += piece
            if seen.count(b"\n\n") >= 15:
                break
        await reading.aclose()  # type: ignore[attr-defined]
        first.die()
        await second.attach(successor)
        rest = await second.read(path, {}, {"last-event-id": _last_id(seen)})
        (told, logprobs), (all_told, all_logprobs) = _told(_events(seen + rest)), _told(expected)
        assert told == all_told
        assert logprobs == pytest.approx(all_logprobs, abs=1e-3)
    finally:
        second.die()
        successor.close()


async def test_an_ingress_that_lives_gives_its_stream_up_to_the_one_that_is_asked(
    config: ResolvedConfig, driver: Driver
) -> None:
    path, body = CHAT
    expected = await _undisturbed(config, driver, path, body)
    first, second = _Ingress(config), _Ingress(config)
    await first.attach(driver)
    await second.attach(driver)
    seen = await first.read(path, body, _RESUMABLE, 6)
    seen += await second.read(path, {}, {"last-event-id": _last_id(seen)}, 6)
    for _ in range(100):  # the news that it was given up is on its way
        await asyncio.sleep(0.005)
    rest = await first.read(path, {}, {"last-event-id": _last_id(seen)})
    assert _events(seen + rest) == expected
    first.die()
    second.die()


@pytest.mark.parametrize(("path", "number"), [("/v1/completions", "3"), (CHAT[0], "x"), (CHAT[0], "-1")])
async def test_an_answer_is_found_by_its_own_endpoint_and_number_alone(
    path: str, number: str, config: ResolvedConfig, driver: Driver
) -> None:
    first, second = _Ingress(config), _Ingress(config)
    await first.attach(driver)
    seen = await first.read(*CHAT, _RESUMABLE, 4)
    first.die()
    await second.attach(driver)
    answer_id = _last_id(seen).partition(":")[0]
    assert b"status 404" in await second.read(path, {}, {"last-event-id": f"{answer_id}:{number}"})
    rest = await second.read(CHAT[0], {}, {"last-event-id": f"{answer_id}:4"})
    assert rest.endswith(b"data: [DONE]\n\n")
    second.die()


async def test_without_the_header_an_answer_ends_with_its_ingress(config: ResolvedConfig, driver: Driver) -> None:
    first, second = _Ingress(config), _Ingress(config)
    await first.attach(driver)
    seen = await first.read(*CHAT, {}, 4)
    first.die()
    await second.attach(driver)
    assert b"status 404" in await second.read(CHAT[0], {}, {"last-event-id": _last_id(seen)})
    second.die()


async def test_a_response_in_the_background_is_fetched_from_another_ingress(
    config: ResolvedConfig, driver: Driver
) -> None:
    first, second, third = _Ingress(config), _Ingress(config), _Ingress(config)
    for ingress in (first, second, third):
        await ingress.attach(driver)
    path, body = STREAMS["responses"]
    whole = json.loads(await first.read(path, {**body, "stream": False}, {}))
    queued = json.loads(await first.read(path, {**body, "stream": False, "background": True}, {}))
    assert queued["status"] in ("queued", "in_progress")
    first.die()
    for _ in range(1000):
        found = (await second.get(f"{path}/{queued['id']}")).json()
        if found["status"] == "completed":
            break
        await asyncio.sleep(0.01)
    assert found["output"][0]["content"] == whole["output"][0]["content"]
    assert (found["id"], found["created_at"]) == (queued["id"], queued["created_at"])

    follow_up = {**body, "stream": False, "previous_response_id": queued["id"], "max_output_tokens": 3}
    answer = json.loads(await third.read(path, follow_up, {}))
    assert answer["usage"]["input_tokens"] > found["usage"]["input_tokens"] + 15, "it goes on from what was said"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=third.app), base_url="http://ingress") as client:
        assert (await client.delete(f"{path}/{queued['id']}")).status_code == 200
    second.die()
    assert (await third.get(f"{path}/{queued['id']}")).status_code == 404
    third.die()


async def test_an_answer_that_another_ingress_made_is_ended_by_its_client(
    config: ResolvedConfig, driver: Driver
) -> None:
    first, second = _Ingress(config), _Ingress(config)
    await first.attach(driver)
    await second.attach(driver)
    seen = await first.read(CHAT[0], {**CHAT[1], "max_tokens": 200}, _RESUMABLE, 3)
    answer_id = _last_id(seen).partition(":")[0]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=second.app), base_url="http://ingress") as client:
        assert (await client.delete(f"{CHAT[0]}/{answer_id}")).json()["deleted"]
        assert (await client.delete(f"{CHAT[0]}/{answer_id}")).status_code == 404
    stats = await second.engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    first.die()
    second.die()
