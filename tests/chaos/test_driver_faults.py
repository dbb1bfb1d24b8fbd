"""A real server loses its driver twice under a mixed load, then its ingress: nothing is lost. Then it ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from served_process import ServedProcess, running_serve
from tiny import make_checkpoint

from rayllm.machine.processes import descendants, end_all

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

LONG: dict[str, Any] = {"model": "tiny", "max_tokens": 250, "ignore_eos": True, "temperature": 0}
TALE = "Once upon a time"
SEEDED: dict[str, Any] = {**LONG, "prompt": TALE, "n": 3, "seed": 3, "temperature": 1.0}
SIZES = {"type": "array", "items": {"enum": ["small", "large", "vast"]}, "minItems": 10, "maxItems": 12}
SCHEMA = {"type": "object", "properties": {"sizes": SIZES}, "required": ["sizes"], "additionalProperties": False}
BOUND: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": TALE}],
    "max_tokens": 600,
    "temperature": 1.0,
    "seed": 5,
    "stream": True,
    "stream_options": {"include_usage": True},
}
LOAD: dict[str, dict[str, Any]] = {
    "stream": {**LONG, "prompt": TALE, "stream": True, "stream_options": {"include_usage": True}},
    "whole": {**LONG, "prompt": "the worker computes tensors", "seed": 7, "temperature": 0.9},
    "choices": {**SEEDED, "stream": True, "logprobs": 2},
    "logprobs": {**LONG, "prompt": [5, 6, 7, 8] * 20, "logprobs": 1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "echo": {**LONG, "prompt": TALE, "logprobs": 0, "echo": True, "return_token_ids": True},
    "schema": {**BOUND, "response_format": {"type": "json_schema", "json_schema": {"name": "sizes", "schema": SCHEMA}}},
    "tool": {
        **BOUND,
        "tools": [{"type": "function", "function": {"name": "pack", "parameters": SCHEMA}}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedProcess]:
    model = make_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=2048)
    with running_serve(str(model), "--served-model-name", "tiny") as served:
        yield served


async def _answer(client: httpx.AsyncClient, url: str, body: dict[str, Any], seen: list[int]) -> Any:
    """The whole answer, or the text, logprobs and ends of a stream by choice. `seen` counts chunks."""
    url += "/v1/chat/completions" if "messages" in body else "/v1/completions"
    if not body.get("stream"):
        answer = (await client.post(url, json=body)).json()
        assert "choices" in answer, answer
        return answer["choices"], _counts(answer["usage"])
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    async with client.stream("POST", url, json=body) as response:
        lines = [line async for line in _counted(response.aiter_lines(), seen)]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        chunk = json.loads(line.removeprefix("data: "))
        usage = _counts(chunk["usage"]) if chunk.get("usage") else usage
        for entry in chunk.get("choices", ()):
            choice = choices.setdefault(entry["index"], {"text": "", "logprobs": {}, "finish_reason": None})
            choice["text"] += entry["text"] if "text" in entry else _text(entry["delta"])
            for name, values in (entry.get("logprobs") or {}).items():
                choice["logprobs"].setdefault(name, []).extend(values)
            choice["finish_reason"] = entry["finish_reason"] or choice["finish_reason"]
    return choices, usage


def _text(delta: dict[str, Any]) -> str:
    """Of a chat's chunk: content, or name and arguments of its call."""
    calls = [call["function"] for call in delta.get("tool_calls") or ()]
    return (delta.get("content") or "") + "".join((call.get("name") or "") + call["arguments"] for call in calls)


def _counts(usage: dict[str, Any]) -> tuple[int, int]:
    return usage["prompt_tokens"], usage["completion_tokens"]


async def _counted(lines: Any, seen: list[int]) -> Any:
    async for line in lines:
        if line.startswith("data: "):
            seen.append(len(line))
            yield line


async def _run(
    server: ServedProcess, load: dict[str, dict[str, Any]], faults: tuple[tuple[int, signal.Signals], ...] = ()
) -> dict[str, Any]:
    """All of the load at once; the driver gets a signal when clients have seen so many chunks."""
    seen: list[int] = []
    killed: set[int] = set()

    async def kill() -> None:
        for num_chunks, sign in faults:
            while len(seen) < num_chunks or not (drivers := set(server.pids("ray::DriverActor")) - killed):
                await asyncio.sleep(0.01)
            [driver] = drivers
            killed.add(driver)
            os.kill(driver, sign)

    async with httpx.AsyncClient(timeout=120) as client:
        answers = await asyncio.gather(*(_answer(client, server.url, body, seen) for body in load.values()), kill())
    return dict(zip(load, answers[:-1], strict=True))


def _exact(value: Any) -> Any:
    """All but the values of logprobs, whose last bits depend on the shape of the batch."""
    if isinstance(value, dict):
        return {name: _exact(inner) for name, inner in value.items() if name not in ("token_logprobs", "top_logprobs")}
    return [_exact(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _logprobs(answer: Any) -> list[float]:
    choices = answer[0].values() if isinstance(answer[0], dict) else answer[0]
    logprobs = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    return [value for entry in logprobs for value in entry["token_logprobs"] if value is not None]


async def test_no_client_sees_that_the_driver_was_killed_and_the_next_one_stopped(server: ServedProcess) -> None:
    stop = (await _run(server, {"choices": LOAD["choices"]}))["choices"][0][1]["text"][20:23]
    load = {**LOAD, "stopped": {**SEEDED, "stop": [stop]}}
    expected = await _run(server, load)
    assert [choice["finish_reason"] for choice in expected["stopped"][0]].count("stop") in (1, 2)
    for name, finish in (("schema", "stop"), ("tool", "tool_calls")):
        [choice] = expected[name][0].values()
        assert choice["finish_reason"] == finish, "it did not come to its grammar's end"
        assert len(json.loads(choice["text"].removeprefix("pack"))["sizes"]) >= 10

    disturbed = await _run(server, load, ((40, signal.SIGKILL), (250, signal.SIGSTOP)))

    for name, answer in expected.items():
        assert _exact(disturbed[name]) == _exact(answer), name
        assert _logprobs(disturbed[name]) == pytest.approx(_logprobs(answer), abs=1e-3), name
    assert server.metric("rayllm:driver_losses_total") == 2
    assert server.metric("rayllm:requests_replayed_total") >= 2 * len(load) - 2
    gap_s = server.metric("rayllm:replay_gap_seconds_sum") / server.metric("rayllm:replay_gap_seconds_count")
    print(f"mean gap {gap_s:.2f} s")


# --------------------------------------------------------------------------------------------------- the ingress


async def _resumed(server: ServedProcess, body: dict[str, Any], seen: list[int]) -> str:
    """All events of a stream; when its connection is lost, the client asks for the rest until somebody has it."""
    url, headers, whole = f"{server.url}/v1/completions", {"x-rayllm-resume": "true"}, ""
    async with httpx.AsyncClient(timeout=120) as client:
        for _ in range(600):
            part = ""
            try:
                async with client.stream("POST", url, json=body, headers=headers) as response:
                    if response.status_code == 200:
                        async for text in response.aiter_text():
                            part += text
                            seen.append(len(text))
            except httpx.HTTPError:
                pass
            whole += part[: part.rfind("\n\n") + 2] if "\n\n" in part else ""  # the last event may be cut
            if whole.endswith("data: [DONE]\n\n"):
                return whole
            if ids := re.findall(r"^id: (.*)$", whole, re.MULTILINE):
                headers = {"last-event-id": ids[-1]}
            await asyncio.sleep(0.1)
    raise AssertionError(f"no end after {len(whole)} characters: {whole[-300:]}")


async def test_a_killed_ingress_costs_a_stream_that_comes_back_no_event(server: ServedProcess) -> None:
    load = [{**LOAD[name], "stream": True} for name in ("stream", "choices")]
    load.append({**LONG, "prompt": "the ingress speaks text", "stop": ["never said"], "stream": True})
    expected = await asyncio.gather(*(_resumed(server, body, []) for body in load))
    seen: list[int] = []

    async def kill() -> None:
        while len(seen) < 60:
            await asyncio.sleep(0.01)
        while not (ingress := server.pids("ray::ServeReplica:rayllm-default:Ingress")):
            await asyncio.sleep(0.01)  # Ray is just changing its title
        os.kill(ingress[0], signal.SIGKILL)

    *disturbed, _ = await asyncio.gather(*(_resumed(server, body, seen) for body in load), kill())

    for before, after in zip(expected, disturbed, strict=True):
        assert _told(after) == _told(before)


def _told(stream: str) -> dict[int, list[Any]]:
    """What each choice was told, but for the last bits of log-probabilities. Choices take turns as steps come; the
    events of all must be numbered without a gap."""
    *events, done, rest = stream.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    told: dict[int, list[Any]] = {}
    for number, event in enumerate(events, start=1):
        data, name = event.removeprefix("data: ").split("\n")
        assert name.endswith(f":{number}")
        chunk = json.loads(data)
        for entry in chunk["choices"]:
            told.setdefault(entry["index"], []).append(_exact(entry))
        if not chunk["choices"]:
            told[-1] = [_counts(chunk["usage"])]
    return told


# ----------------------------------------------------------------------------------------------------- the server


_RAYS_AGENTS = ("ray::DashboardA", "ray::RuntimeEnv")
"""Ray's own two agents outlive a killed serve by about a minute; no port of ours is theirs."""


def test_a_killed_serve_takes_its_engine_along(server: ServedProcess) -> None:
    """The last test of this server."""
    family = descendants(server.process.pid)
    engine = {each for each in family if not each.command().startswith(_RAYS_AGENTS)}
    assert {"raylet", "gcs_server"} <= {each.command() for each in engine}
    assert len(engine) >= 8
    try:
        server.process.kill()
        server.process.wait(30)
        deadline = time.monotonic() + 60
        while any(each.is_alive() for each in engine) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [each.command_line() for each in engine if each.is_alive()]
    finally:
        end_all(family, grace_s=2)
