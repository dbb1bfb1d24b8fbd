"""The dashboard in a real browser, over figures that the test moves."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.request

import msgspec
from api.fake_engine import FakeEngine
from serve.pages.browser import PHONE, Browser
from serve.pages.scripted import ScriptedServer
from serve.served import chat as chat_body

from rayllm.engine.driver.actor import EngineDescription
from rayllm.engine.driver.fault_injection import KilledWorker
from rayllm.executor.worker_process import WorkerPlace
from rayllm.messages import EngineStats
from rayllm.observability.declared import LATENCY_EDGES_S
from rayllm.observability.histogram import Histogram
from rayllm.serve.routes.pages import Deployment


def moved(served: ScriptedServer, **figures: object) -> None:
    """The engine's figures from now on."""

    async def stats() -> EngineStats:
        return msgspec.structs.replace(await FakeEngine.stats(served.engine), **figures)

    served.engine.stats = stats  # type: ignore[method-assign]


def tile(browser: Browser, name: str) -> str:
    rows = "[...document.querySelectorAll('#tiles > div, #faults > div')]"
    found = f"return {rows}.find((row) => row.firstChild.innerText === arguments[0])?.lastChild.innerText"
    return str(browser.run(found, name))


def is_quiet(browser: Browser, for_s: float = 1.3) -> bool:
    browser.requested()
    time.sleep(for_s)
    return browser.requested() == []


def ask_one(url: str) -> None:
    body = json.dumps(chat_body()).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"content-type": "application/json"})
    urllib.request.urlopen(request, timeout=20).read()


def test_the_smallest_phones_show_the_state_whole(browser: Browser, served: ScriptedServer, url: str) -> None:
    browser.open(f"{url}/dashboard", size=(320, 640))
    browser.wait_text("#state", "Ready")
    assert browser.run("const state = document.getElementById('state'); return state.scrollWidth <= state.clientWidth")


def test_the_figures_move_with_the_traffic(browser: Browser, served: ScriptedServer, url: str) -> None:
    moved(served, num_running=0, num_blocks=100)
    browser.open(f"{url}/dashboard")
    browser.wait_text("#state", "Ready")
    browser.wait(lambda: tile(browser, "Running") == "0")
    assert "No answers in the last minute" in browser.text("#charts")
    gaps = Histogram(LATENCY_EDGES_S)
    gaps.observe(2.5)
    moved(
        served,
        num_running=3,
        num_waiting=2,
        num_blocks=100,
        num_blocks_used=40,
        prefix_queries=200,
        prefix_hits=50,
        faults={"crash": 1, "hang": 1},
        fault_gaps=gaps.snapshot(),
        num_replays=3,
    )
    for _ in range(3):
        ask_one(url)
    browser.wait(lambda: tile(browser, "Running") == "3" and "p50" in browser.text("#charts"))
    assert (tile(browser, "Waiting"), tile(browser, "KV cache in use")) == ("2", "40%")
    assert tile(browser, "Prefix cache hits") == "25%"
    assert float(tile(browser, "Generated tokens/s").replace("k", "")) > 0
    assert (tile(browser, "Worker crashes and hangs"), tile(browser, "Requests and sequences replayed")) == ("2", "3")
    assert (tile(browser, "Gap after a fault, median")[-2:], tile(browser, "Preemptions")) == (" s", "0")
    first_token = "[aria-label='Time to first token'] .legend"
    browser.wait(lambda: "–" not in browser.text(first_token), "percentiles")
    assert browser.text(first_token).count("ms") == 3
    assert len(browser.all("[aria-label='Requests'] path.line")) == 2
    assert "ended: stop" in browser.text("#ends")
    told = browser.run("return document.querySelector('[aria-label=Requests] svg').ariaLabel")
    assert told == "Requests: running 3, waiting 2"


def test_it_pauses_and_says_when_the_server_is_gone(browser: Browser) -> None:
    served = ScriptedServer()
    with served.url() as url:
        browser.open(f"{url}/dashboard")
        browser.wait_text("#state", "Ready")
        browser.click("#pause")
        assert browser.run("return document.getElementById('pause').ariaLabel") == "Go on"
        browser.wait(lambda: is_quiet(browser), "no more requests")
        browser.click("#pause")
        browser.wait(browser.requested, "requests again")
        browser.run(
            "Object.defineProperty(document, 'hidden', {value: true});"
            "document.dispatchEvent(new Event('visibilitychange'))"
        )
        browser.wait(lambda: is_quiet(browser), "no more requests while nobody looks")
        browser.driver.refresh()
        browser.wait_text("#state", "Ready")
    browser.wait_text("#banner", "cannot be reached")
    assert browser.text("#state") == "No answer"
    browser.driver.get("about:blank")
    assert all("ERR_CONNECTION_REFUSED" in line or "ERR_EMPTY_RESPONSE" in line for line in browser.logs())


def test_it_shows_how_far_a_server_is_that_starts(browser: Browser) -> None:
    served = ScriptedServer()
    served.service.set_stage("loading weights")
    with served.url() as url:
        browser.open(f"{url}/dashboard")
        browser.wait_text("#state", "loading weights")
        browser.open(f"{url}/")
        browser.wait_text("#banner", "The model is not ready yet: loading weights")
        served.make_ready()
        browser.wait(lambda: not browser.is_shown("#banner"))
        assert browser.text(".picker select") == "tiny"
        assert all("503" in line for line in browser.logs())


def test_ranges_errors_by_kind_and_gaps_after_faults(browser: Browser, served: ScriptedServer, url: str) -> None:
    moved(served, num_blocks=100)
    browser.open(f"{url}/dashboard")
    browser.wait_text("#state", "Ready")
    browser.wait(lambda: tile(browser, "Running") == "0")
    assert browser.texts("#ranges button") == ["1 min", "15 min", "60 min"]
    assert browser.texts("#ranges [aria-pressed=true]") == ["15 min"]
    assert "No fault in this range" in browser.text("[aria-label='Gap after a fault']")
    for bad in ({"model": "other"}, {"max_tokens": -1}):
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(chat_body(**bad)).encode(), {"content-type": "application/json"}
        )
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(request, timeout=20)
    gaps, detections = Histogram(LATENCY_EDGES_S), Histogram(LATENCY_EDGES_S)
    gaps.observe(0.75), detections.observe(0.05)
    moved(
        served,
        num_blocks=100,
        faults={"crash": 1, "hang": 0},
        fault_gaps=gaps.snapshot(),
        fault_detections=detections.snapshot(),
    )
    browser.wait_text("[aria-label='Gap after a fault'] .legend", "0.75 s")
    assert len(browser.all("[aria-label='Gap after a fault'] rect.bar-mark")) == 2
    browser.wait_text("#errors", "worker crash")
    shown = browser.text("#errors")
    assert "refused: model_not_found" in shown
    assert "1 of " in shown
    browser.wait_text("[aria-label='Errors in a minute'] .legend", "faults 1")
    browser.click("#ranges button:last-child")
    assert browser.texts("#ranges [aria-pressed=true]") == ["60 min"]
    browser.driver.refresh()
    browser.wait_text("#state", "Ready")
    assert browser.texts("#ranges [aria-pressed=true]") == ["60 min"]  # kept


def test_of_many_kinds_of_errors_the_rarest_share_a_row(browser: Browser) -> None:
    server = ScriptedServer()
    for number in range(9):
        for _ in range(10 - number):
            server.service.model().metrics.request_refused(f"kind{number}")
    with server.url() as url:
        browser.open(f"{url}/dashboard", size=PHONE)
        browser.wait_text("#errors", "other kinds")
        rows = browser.texts("#errors li")
        browser.driver.get("about:blank")
    assert len(rows) == 5
    assert rows[0].startswith("refused: kind0 0 of 10")
    assert rows[-1].startswith("5 other kinds 0 of 20")


def test_on_a_phone_what_is_wider_shows_that_it_scrolls(browser: Browser) -> None:
    place = WorkerPlace(4711, "n" * 56, "192.168.100.101", ("cuda:0",))

    async def describe() -> Deployment:
        return Deployment(place, EngineDescription("{}", "tiny", 64, place, (place,)))

    with ScriptedServer(describe=describe).url() as url:
        browser.open(f"{url}/dashboard", size=PHONE)
        browser.wait(lambda: browser.all(".table-scroll.more-after"), "the hint at the table's right side")
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        browser.driver.get("about:blank")


def test_a_worker_can_be_killed_where_the_server_allows_it(browser: Browser, served: ScriptedServer, url: str) -> None:
    browser.open(f"{url}/dashboard")
    browser.wait_text("#state", "Ready")
    assert not browser.is_shown("#kill-head")
    place = WorkerPlace(4711, "n" * 56, "10.0.0.1", ("cpu",))
    ranks: list[int] = []

    async def describe() -> Deployment:
        return Deployment(place, EngineDescription("{}", "tiny", 64, place, (place,)))

    async def kill(rank: int) -> KilledWorker:
        ranks.append(rank)
        return KilledWorker(rank, place)

    killing = ScriptedServer(describe=describe, kill_worker=kill)
    with killing.url() as other:
        browser.open(f"{other}/dashboard")
        browser.click("[aria-label='Kill worker rank 0']")
        browser.wait_text("#toasts", "Worker rank 0 (pid 4711) was killed.")
        assert ranks == [0]
        gaps = Histogram(LATENCY_EDGES_S)
        gaps.observe(0.5)
        moved(killing, fault_gaps=gaps.snapshot())
        browser.wait_text("#toasts", "0.5 s lay between the steps")
        browser.driver.get("about:blank")
