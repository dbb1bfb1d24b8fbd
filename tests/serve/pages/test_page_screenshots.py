"""Pictures of both pages for a person to judge: `pytest tests/serve/pages --page-screenshots FOLDER`."""

from __future__ import annotations

import itertools
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import orjson
import pytest
from api.fake_engine import FakeEngine
from serve.pages.browser import DESKTOP, PHONE, Browser
from serve.pages.conftest import open_chat
from serve.pages.scripted import ANSWERS, ScriptedServer
from serve.pages.test_chat_page import ask, asked, ended
from serve.served import chat as chat_body

from rayllm.engine.driver.actor import EngineDescription
from rayllm.errors import ContextLengthError
from rayllm.executor.worker_process import WorkerPlace
from rayllm.messages import EngineStats
from rayllm.observability.declared import LATENCY_EDGES_S
from rayllm.observability.histogram import Histogram
from rayllm.serve.routes.pages import Deployment

ANSWERS["batching?"] = """**Continuous batching** decides anew at *every step* which requests run together.

1. A request that ends leaves at once, and its KV blocks are free.
2. One that waits takes its place, without waiting for the others.

```python
while requests:
    plan = scheduler.schedule(budget=2048)  # tokens, not requests
    for sequence, token in worker.run(plan):
        sequence.append(token)
```

| Batching   | Idle slots | First token |
|:-----------|-----------:|------------:|
| static     |       61 % |      4.10 s |
| continuous |        3 % |      0.21 s |

> The gain grows with how much the answers differ in length.
"""
ANSWERS["sentence"] = "It keeps the device busy: whoever ends makes room for whoever waits, at every step."
QUESTION = "How does a server keep a GPU busy with continuous batching?"
LOAD_S = 25


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    chosen = request.config.getoption("--page-screenshots")
    if not chosen:
        pytest.skip("pictures are made with --page-screenshots FOLDER")
    folder = Path(chosen)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize(("size", "name"), [(DESKTOP, "desktop"), (PHONE, "phone")])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_chat_page(
    folder: Path, browser: Browser, served: ScriptedServer, url: str, size: tuple[int, int], name: str, scheme: str
) -> None:
    def picture(what: str) -> None:
        time.sleep(0.3)
        browser.screenshot(folder / f"chat-{what}-{name}-{scheme}.png")

    open_chat(browser, url, size=size, scheme=scheme)
    picture("empty")
    asked(browser, "What is the capital of Norway? Please think")
    asked(browser, QUESTION, 2)
    picture("answer")
    served.engine.step_s = 0.01
    ask(browser, "Tell me something long")
    time.sleep(1.5)
    picture("streaming")
    browser.click("#stop")
    ended(browser, 3)
    served.engine.step_s = 0
    asked(browser, "What is the weather in Oslo? Please call", 4)
    served.engine.refusal = ContextLengthError(
        "This model's maximum context length is 65536 tokens. The messages have 70211 tokens, and max_tokens=256 "
        "were asked for: shorten them",
        param="messages",
    )
    ask(browser, "And now?")
    ended(browser, 5)
    picture("error")
    browser.logs()
    browser.click("#open-settings")
    picture("settings")
    browser.press("\ue00c")
    if size == PHONE:
        browser.click("#open-sidebar")
        picture("sidebar")


@pytest.mark.parametrize(("size", "name"), [(DESKTOP, "desktop"), (PHONE, "phone")])
def test_comparing(
    folder: Path, browser: Browser, served: ScriptedServer, url: str, size: tuple[int, int], name: str
) -> None:
    open_chat(browser, url, size=size)
    browser.click("#compare")
    browser.click("[aria-label^='Settings of side B']")
    browser.type("#set-temperature", "0.7")
    browser.type("#set-seed", "3")
    browser.press("\ue00c")
    asked(browser, QUESTION)
    asked(browser, "The same in one sentence", 2)
    browser.screenshot(folder / f"compare-{name}.png")


class _Load:
    """Figures of a busy engine, and requests beside them."""

    def __init__(self, served: ScriptedServer, url: str):
        self._served, self._url = served, url
        self._beat = itertools.count()
        self._steps = Histogram(LATENCY_EDGES_S)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(5)]

    async def stats(self) -> EngineStats:
        beat = next(self._beat)
        if beat == 8:
            self._steps.observe(1.4)
        return msgspec.structs.replace(
            await FakeEngine.stats(self._served.engine),
            num_running=5 + beat % 7,
            num_waiting=max(0, beat % 9 - 4),
            num_blocks=512,
            num_blocks_used=120 + 14 * (beat % 11),
            prefix_queries=400 * beat,
            prefix_hits=230 * beat,
            faults={"crash": 1} if beat > 8 else {},
            num_replays=6 if beat > 8 else 0,
            fault_gaps=self._steps.snapshot(),
            num_recomputed_tokens=812 if beat > 8 else 0,
        )

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        while not self._stop.is_set():
            body = orjson.dumps(chat_body(max_tokens=8 + 9 * number, messages=[{"role": "user", "content": "a long"}]))
            headers = {"content-type": "application/json"}
            urllib.request.urlopen(urllib.request.Request(f"{self._url}/v1/chat/completions", body, headers)).read()
            time.sleep(0.05 * number)


@pytest.fixture(scope="module")
def busy() -> Iterator[str]:
    place = WorkerPlace(4711, "a1b2c3" * 8, "10.0.0.4", ("cpu",))
    workers = tuple(WorkerPlace(4720 + i, place.node_id, place.host, (f"cuda:{i}",)) for i in range(2))

    async def describe() -> Deployment:
        return Deployment(
            WorkerPlace(4702, place.node_id, place.host, ("cpu",)), EngineDescription("", "", 512, place, workers)
        )

    served = ScriptedServer(describe=describe)
    served.engine.step_s = 0.012
    with served.url() as url:
        load = _Load(served, url)
        served.engine.stats = load.stats  # type: ignore[method-assign]
        with load:
            yield url


@pytest.mark.parametrize(("size", "name"), [(DESKTOP, "desktop"), (PHONE, "phone")])
def test_the_dashboard_under_load(folder: Path, browser: Browser, busy: str, size: tuple[int, int], name: str) -> None:
    browser.open(f"{busy}/dashboard", size=size)
    browser.wait_text("#state", "Ready")
    time.sleep(LOAD_S)
    browser.screenshot(folder / f"dashboard-{name}-light.png", whole=True)
    browser.scheme("dark")
    time.sleep(0.4)
    browser.screenshot(folder / f"dashboard-{name}-dark.png", whole=True)
