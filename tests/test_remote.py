"""A client of an engine that another process runs, without Ray: the driver is in this process, found by a stand-in."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs import fenced

import rayllm
from rayllm import SamplingParams, remote
from rayllm.config import RAY_NAMESPACE
from rayllm.engine.client.driver_connection import DriverConnection, connect
from rayllm.engine.driver.actor import Driver
from rayllm.engine.owner.program import program_config, resolve_for_program
from rayllm.errors import ConfigError, EngineUnreachableError, RequestError
from rayllm.executor.inproc import InprocExecutor
from rayllm.machine import registry
from rayllm.machine.registry import Entry, listed
from rayllm.remote import _Found, get_engine

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    started = Driver(lambda config, on_stage: InprocExecutor.load(config))
    started.start(
        resolve_for_program(program_config("", {"distributed_executor_backend": "inproc", "num_kv_blocks": 600}))
    )
    yield started
    started.close()


@pytest.fixture
def released(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has every engine be the driver's; the names of those that were given up."""
    names: list[str] = []

    async def connect_by_name(name: str, *, namespace: str) -> DriverConnection:
        return await connect(driver.address())

    def by_name(name: str | None, namespace: str) -> _Found:
        if name not in (None, "default"):
            raise EngineUnreachableError(f"no engine named {name!r} here")
        assert driver.config is not None
        return _Found("default", namespace, driver.config, lambda: names.append("default"))

    monkeypatch.setattr(remote, "connect_by_name", connect_by_name)
    monkeypatch.setattr(remote, "_by_name", by_name)
    return names


def test_a_program_without_asyncio_asks_and_gets_results(released: list[str]) -> None:
    with get_engine() as engine:
        output = engine.generate("Once upon a time", GREEDY).result(60)
        assert output.finished
        text = output.outputs[0].text
        assert "".join(part.text for part in engine.stream("Once upon a time", GREEDY)) == text
        growing = list(engine.generate("Once upon a time", GREEDY))
        assert growing[-1].outputs[0].text == text
        many = [engine.generate("Once upon a time", GREEDY) for _ in range(20)]  # all at once
        assert {each.result(60).outputs[0].text for each in many} == {text}
        assert engine.chat([{"role": "user", "content": "Hi"}], GREEDY).result(60).finished
        assert engine.stats().result(60).num_running == 0
        assert engine.config.served_model_name == "rayllm-demo"
        assert released == []
    assert released == ["default"]


async def test_a_coroutine_awaits_or_iterates(released: list[str]) -> None:
    engine = await get_engine("default")
    first = await engine.generate("Once upon a time", GREEDY)
    outputs = await asyncio.gather(*(engine.generate("Once upon a time", GREEDY) for _ in range(20)))
    assert {output.outputs[0].text for output in outputs} == {first.outputs[0].text}
    parts = [part.text async for part in engine.stream("Once upon a time", GREEDY)]
    assert "".join(parts) == first.outputs[0].text
    assert (await engine.stats()).num_running == 0
    await engine.close()
    await engine.close()
    assert released == ["default"]


def test_threads_and_event_loops_share_one_engine(released: list[str]) -> None:
    texts: list[str] = []

    def blocking() -> None:
        texts.append(engine.generate("Once upon a time", GREEDY).result(60).outputs[0].text)

    def in_a_loop_of_its_own() -> None:
        async def ask() -> None:
            texts.append((await engine.generate("Once upon a time", GREEDY)).outputs[0].text)

        asyncio.run(ask())

    with get_engine() as engine:
        threads = [threading.Thread(target=work) for work in (blocking, in_a_loop_of_its_own) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(texts) == 8
    assert len(set(texts)) == 1


def test_an_engine_that_is_not_found_is_an_error_at_once(released: list[str]) -> None:
    with pytest.raises(EngineUnreachableError, match="no engine named 'nope'"):
        get_engine("nope")


def test_the_prefix_cache_is_emptied(driver: Driver, released: list[str]) -> None:
    prompt = "Once upon a time there was a small model. " * 4
    with get_engine() as engine:
        engine.generate(prompt, GREEDY).result(60)
        again = engine.generate(prompt, GREEDY).result(60)
        assert engine.reset_prefix_cache().result(60) is True
        anew = engine.generate(prompt, GREEDY).result(60)
    assert again.metrics.num_cached_tokens > 0
    assert anew.metrics.num_cached_tokens == 0
    assert anew.outputs[0].token_ids == again.outputs[0].token_ids


async def test_in_a_coroutine_await_raises_what_went_wrong(released: list[str]) -> None:
    with pytest.raises(EngineUnreachableError, match="no engine named 'nope'"):
        await get_engine("nope")


def test_a_bad_request_harms_no_other_and_a_closed_engine_says_so(released: list[str]) -> None:
    with get_engine() as engine:
        with pytest.raises(RequestError, match="vocabulary"):
            engine.generate([10**6], GREEDY).result(60)
        assert engine.generate("Hi", GREEDY).result(60).finished
    with pytest.raises(EngineUnreachableError, match="was closed: call get_engine again"):
        engine.generate("Hi", GREEDY)


def test_a_handle_is_passed_to_another_process_by_its_name(released: list[str]) -> None:
    with get_engine() as engine:
        assert engine.__reduce__() == (get_engine, ("default", RAY_NAMESPACE))


# ---------------------------------------------------------------------------------- where it is looked for


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without servers, and this process connected to no Ray."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(remote, "ray_is_initialized", lambda: False)


def _server(monkeypatch: pytest.MonkeyPatch, pid: int, name: str) -> Iterator[None]:
    monkeypatch.setattr(Entry, "is_alive", lambda entry: True)
    monkeypatch.setattr(registry, "this_process", lambda: registry.Process(pid, 1))
    with listed(
        "serve", name=name, model="m", url=f"http://127.0.0.1:{pid}", log=Path("/l"), shutdown_timeout_s=1
    ) as it:
        it.note_ray(f"127.0.0.1:{pid + 1}", "")
        yield


@pytest.fixture
def two_servers(machine: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for _ in _server(monkeypatch, 1001, "one"):
        yield from _server(monkeypatch, 1003, "two")


def test_without_a_server_the_error_says_how_to_start_one(machine: None) -> None:
    for look in (rayllm.get_engine, rayllm.connect):
        with pytest.raises(EngineUnreachableError, match="you have no running server on this machine: start one with"):
            look()


def test_of_several_servers_one_must_be_named(two_servers: None) -> None:
    for look in (rayllm.get_engine, rayllm.connect):
        with pytest.raises(ConfigError, match=r"2 servers are running, name one of them: 'one': .*'two': "):
            look()
    with pytest.raises(EngineUnreachableError, match=r"no server named 'twoo' is running here; did you mean 'two'\?"):
        rayllm.get_engine("twoo")


def test_a_server_whose_ray_does_not_answer_is_named_with_its_address(two_servers: None) -> None:
    for find in (
        lambda: rayllm.get_engine("two"),
        lambda: rayllm.connect(1003),
        lambda: rayllm.connect("localhost:1003"),
    ):
        with pytest.raises(EngineUnreachableError, match=r"the Ray at 127\.0\.0\.1:1004"):
            find()


def test_a_process_that_is_connected_to_another_ray_is_told_so(
    two_servers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str, namespace: str) -> None:
        raise EngineUnreachableError(f"no engine named {name!r} in this Ray cluster; running: none")

    monkeypatch.setattr(remote, "ray_is_initialized", lambda: True)
    monkeypatch.setattr(remote, "cluster_address", lambda: "10.0.0.1:6379")
    monkeypatch.setattr(remote, "find_driver", missing)
    monkeypatch.setattr(remote, "known_engines", lambda namespace: [])
    for find in (lambda: rayllm.get_engine("two"), lambda: rayllm.connect("two")):
        with pytest.raises(
            EngineUnreachableError, match=r"server 'two' \(pid 1003\) runs in the Ray at 127.0.0.1:1004"
        ):
            find()
    with pytest.raises(EngineUnreachableError, match=r"no engine runs in the Ray at 10.0.0.1:6379; server 'one'"):
        rayllm.get_engine()
    monkeypatch.setattr(remote, "known_engines", lambda namespace: ["a", "b", "llm-12"])
    with pytest.raises(ConfigError, match="2 engines run in this Ray, say which by its name: 'a', 'b'"):
        rayllm.get_engine()


# -------------------------------------------------------------------------------------------- the documents


@pytest.mark.parametrize(("document", "block"), [(d, block) for d, block in fenced("python") if "get_engine" in block])
def test_a_snippet_of_the_documents_that_uses_a_running_engine_runs(
    document: str, block: str, released: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(block, document, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()
    assert released == ["default"]
