"""The whole of it: `rayllm serve` as a person starts it, two workers, over HTTP with the openai client; once behind
Serve's Python proxy, once behind HAProxy."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from observability.collector import QUICK, Collector, collecting
from served_process import ServedProcess, running_serve

from rayllm.demo import DEMO_MODEL_NAME

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

_READ_TIMEOUT_S = 4
QUESTIONS = ["What is RayLLM?", "Hello!", "What is a paged KV cache?", "Tell me a story about a fox.", "Who are you?"]
GREEDY: dict[str, Any] = {"model": DEMO_MODEL_NAME, "temperature": 0, "max_tokens": 60}


@dataclass(frozen=True)
class Server:
    served: ServedProcess
    client: openai.OpenAI
    proxy: str
    collector: Collector
    """Of its traces."""
    log: Path

    @property
    def url(self) -> str:
        return self.served.url


@pytest.fixture(scope="module", params=["haproxy", "python"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "events.jsonl"
    flags = ["-tp", "2", "--max-model-len", "1024", "--http-proxy", request.param]
    flags += ["--read-timeout-s", str(_READ_TIMEOUT_S), "--log-format", "json", "--log-file", str(log)]
    with (
        collecting() as collector,
        running_serve(*flags, "--otlp-traces-endpoint", collector.endpoint, env=QUICK) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120) as client,
    ):
        yield Server(served, client, request.param, collector, log)


def test_what_it_says_is_its_own(server: Server) -> None:
    """Its last words are looked at when it is stopped."""
    said = server.served.output.read_text().splitlines()
    assert said[-1].startswith("Press Ctrl-C to stop")
    ours = re.compile(r"Ray \.\.\.|\bRay +127\.0\.0\.1:\d+|import rayllm; engine = rayllm\.get_engine\(")
    assert not any("ray" in line.lower().replace("rayllm", "") for line in said if not ours.search(line))
    assert server.served.errors.read_text() == ""


def _ask(question: str) -> list[Any]:
    return [{"role": "user", "content": question}]


def test_a_chat_streamed_is_the_chat_whole(server: Server) -> None:
    whole = server.client.chat.completions.create(messages=_ask(QUESTIONS[0]), **GREEDY)
    assert whole.choices[0].message.content
    assert "Ray" in whole.choices[0].message.content
    assert whole.usage is not None
    chunks = list(
        server.client.chat.completions.create(
            messages=_ask(QUESTIONS[0]), stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert reasons == [whole.choices[0].finish_reason]


def test_a_completion_with_choices_logprobs_and_a_stop_string(server: Server) -> None:
    def complete(**fields: Any) -> Any:
        return server.client.completions.create(
            model=DEMO_MODEL_NAME,
            prompt="A driver plans tokens",
            max_tokens=20,
            temperature=1.5,
            seed=5,
            extra_body={"ignore_eos": True},
            **fields,
        )

    answer = complete(n=3, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) == 3
    for choice in answer.choices:
        assert "".join(choice.logprobs.tokens).replace("<|im_end|>", "") == choice.text
        assert all(len(top) >= 2 for top in choice.logprobs.top_logprobs)
    assert [choice.text for choice in complete(n=3).choices] == [choice.text for choice in answer.choices]
    text = answer.choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    [stopped] = complete(stop=stop).choices
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"


async def test_sixty_four_streams_at_once_equal_their_solo_runs(server: Server) -> None:
    async def streamed(client: openai.AsyncOpenAI, number: int) -> str:
        sampling = {**GREEDY, "temperature": 0.8 if number % 2 else 0, "seed": number % 10}
        question = _ask(QUESTIONS[number % 5])
        stream = await client.chat.completions.create(messages=question, stream=True, **sampling)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        solo = [await streamed(client, number) for number in range(10)]
        together = await asyncio.gather(*(streamed(client, number) for number in range(64)))
    assert together == [solo[number % 10] for number in range(64)]
    assert len(set(solo)) >= 5


async def test_a_client_that_leaves_frees_its_blocks(server: Server) -> None:
    body = {**GREEDY, "messages": _ask("Tell me a story."), "max_tokens": 400, "ignore_eos": True, "stream": True}
    async with httpx.AsyncClient(timeout=60) as client:
        for _ in range(3):
            async with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if '"content"' in line:
                        break
    deadline = time.monotonic() + 5
    while (running := server.served.metric("vllm:num_requests_running")) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    assert running == 0
    assert server.served.metric("vllm:kv_cache_usage_perc") == 0


def test_a_request_is_one_trace_through_all_processes(server: Server) -> None:
    trace_id, client_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace_id}-{client_id}-01"}
    server.client.chat.completions.create(messages=_ask(QUESTIONS[0]), extra_headers=headers, **GREEDY)
    ingress = [("ingress", name) for name in ("llm_request", "prepare", "respond")]
    engine = [("driver", "decode"), ("driver", "prefill"), ("driver", "queue"), *[("worker", "execute")] * 2]
    spans = server.collector.of_trace(trace_id, num_spans=8)
    assert sorted((span.process, span.name) for span in spans) == sorted([*ingress, *engine])
    [request] = [span for span in spans if span.name == "llm_request"]
    assert request.parent_id == client_id
    assert {span.parent_id for span in spans if span is not request} == {request.span_id}


def test_errors_are_in_the_envelope(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        server.client.chat.completions.create(**{**GREEDY, "model": "nobody"}, messages=_ask("hi"))
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="maximum context length is 1024"):
        server.client.completions.create(model=DEMO_MODEL_NAME, prompt="word " * 2000, max_tokens=5)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        server.client.completions.create(model=DEMO_MODEL_NAME, prompt="a", extra_body={"temprature": 1})
    answer = httpx.get(f"{server.url}/nowhere")
    assert answer.status_code == 404
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_models_health_and_version(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == [DEMO_MODEL_NAME]
    assert server.client.models.retrieve(DEMO_MODEL_NAME).id == DEMO_MODEL_NAME
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert "version" in httpx.get(f"{server.url}/version").json()
    assert server.served.metric("vllm:generation_tokens_total") > 0


def test_nothing_listens_beyond_loopback(server: Server) -> None:
    listening = {(address, port) for address, port, _ in server.served.listeners()}
    assert len(listening) > 5
    assert {address for address, _ in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_its_processes_get_as_much_of_the_cpu_as_other_programs(server: Server) -> None:
    processes = server.served.pids("ray::WorkerActor") + server.served.pids("ray::DriverActor")
    assert len(processes) == 3
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in processes} == {os.nice(0)}


def test_a_reader_that_does_not_read_is_paused_and_closed(server: Server) -> None:
    """Serve's Python proxy takes all of an answer that nobody reads, so only HAProxy can tell."""
    if server.proxy == "python":
        pytest.skip("Serve's Python proxy reads for a client that does not")
    fields = {"max_tokens": 100, "stream": True, "ignore_eos": True, "echo": True, "logprobs": 20}
    body = json.dumps({"model": DEMO_MODEL_NAME, "prompt": [5 + i % 90 for i in range(900)], **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.settimeout(60)
        reader.connect(("127.0.0.1", server.served.port))
        reader.sendall(head + body)
        answer = server.client.chat.completions.create(messages=_ask("Hello!"), **GREEDY)  # others are unharmed
        assert answer.choices[0].message.content
        received = reader.recv(1000, socket.MSG_WAITALL)  # it has begun
        time.sleep(_READ_TIMEOUT_S + 2)
        assert server.served.metric("vllm:num_requests_running") == 0
        while piece := _received(reader):
            received += piece
    assert b"data: [DONE]" not in received


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 20)
    except ConnectionResetError:
        return b""


def test_the_request_id_comes_back_once(server: Server) -> None:
    answer = httpx.get(f"{server.url}/health", headers={"x-request-id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_a_killed_worker_costs_no_request_and_changes_no_token(server: Server) -> None:
    """The last test of this server: one of its workers is another afterwards."""
    body = {**GREEDY, "messages": _ask("Tell me a story."), "max_tokens": 400, "ignore_eos": True}
    undisturbed = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]
    workers = server.served.pids("ray::WorkerActor")
    assert len(workers) == 2
    text, finish = "", None
    fields: dict[str, Any] = {"json": {**body, "stream": True}, "headers": {"x-request-id": "hurt"}, "timeout": 60}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", **fields) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            if not text and chunk["choices"][0]["delta"].get("content"):
                os.kill(workers[1], signal.SIGKILL)
            text += chunk["choices"][0]["delta"].get("content") or ""
            finish = chunk["choices"][0]["finish_reason"] or finish
    assert text == undisturbed["message"]["content"]
    assert finish == undisturbed["finish_reason"] == "length"
    assert server.served.metric("rayllm:worker_faults_total") == 1
    survivors = server.served.pids("ray::WorkerActor")
    assert workers[0] in survivors
    assert workers[1] not in survivors
    events = [json.loads(line) for line in server.log.read_text().splitlines()]
    told = {event["process"]: event["message"] for event in events if event.get("request_id") == "hurt"}
    assert set(told) == {"driver", "ingress"}
    assert "when a worker failed" in told["driver"]
