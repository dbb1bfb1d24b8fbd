"""What HTTP costs: requests a second and streamed tokens a second of OpenAI servers, in turn, and CPU time a request.

    python benchmarks/http_server.py NAME=URL [NAME=URL ...] [--model NAME] [--connections 32] [--requests 512]
        [--rounds 3] [--prompt-tokens 16] [--stream-tokens 64]

Each server is up already and serves the same model; a round asks each in turn: `--requests` completions of one token
over `--connections` kept-alive connections, then `--connections` streams of `--stream-tokens` tokens each. Prompts are
token ids, other ones in each round, so that no prefix cache helps. The client is a few lines over plain sockets, since
it runs on the same cores. With `--cpu`, no server is asked: the CPU time of one process, with an engine that computes
nothing, is told for a request through the whole app, for its parts, and for a token.
Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

_VOCAB = 2000
_T = TypeVar("_T")


@dataclass
class Rates:
    """Of one server, a figure for each round."""

    requests_per_s: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)


class Connection:
    """One kept-alive connection."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._path = parts.path.rstrip("/")
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: dict[str, Any]) -> bytes:
        """The whole body of the answer, which must be 200."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port, limit=2**20)
        reader, writer = self._streams
        data = json.dumps(body).encode()
        head = f"POST {self._path}{path} HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        status = int((await reader.readline()).split()[1])
        headers = {}
        while (line := (await reader.readline()).strip()) != b"":
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip().lower()
        answer = await _read_body(reader, headers)
        if status != 200:
            raise RuntimeError(f"{path} answered {status}: {answer[:300]!r}")
        if headers.get("connection") == "close":
            self.close()
        return answer

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding") != "chunked":
        return await reader.readexactly(int(headers.get("content-length", "0")))
    pieces = []
    while size := int(await reader.readline(), 16):
        pieces.append((await reader.readexactly(size + 2))[:-2])
    await reader.readline()
    return b"".join(pieces)


async def _round(url: str, options: argparse.Namespace, seed: int, rates: Rates) -> None:
    draw = random.Random(seed)
    connections = [Connection(url) for _ in range(options.connections)]
    prompts = [[draw.randrange(3, _VOCAB) for _ in range(options.prompt_tokens)] for _ in range(options.requests)]
    common = {"model": options.model, "temperature": 0, "ignore_eos": True}
    latencies: list[float] = []

    async def ask(connection: Connection) -> None:
        while prompts:
            body = {**common, "prompt": prompts.pop(), "max_tokens": 1}
            began_s = time.perf_counter()
            await connection.post("/v1/completions", body)
            latencies.append(time.perf_counter() - began_s)

    async def stream(connection: Connection, number: int) -> None:
        prompt = [draw.randrange(3, _VOCAB) for _ in range(options.prompt_tokens)]
        body = {**common, "prompt": prompt, "max_tokens": options.stream_tokens, "stream": True}
        await connection.post("/v1/completions", body)

    await asyncio.gather(
        *(connection.post("/v1/completions", {**common, "prompt": [5], "max_tokens": 1}) for connection in connections)
    )
    began_s = time.perf_counter()
    await asyncio.gather(*(ask(connection) for connection in connections))
    rates.requests_per_s.append(options.requests / (time.perf_counter() - began_s))
    rates.p50_ms.append(1e3 * statistics.median(latencies))
    rates.p99_ms.append(1e3 * sorted(latencies)[int(len(latencies) * 0.99)])
    began_s = time.perf_counter()
    await asyncio.gather(*(stream(connection, i) for i, connection in enumerate(connections)))
    rates.tokens_per_s.append(options.connections * options.stream_tokens / (time.perf_counter() - began_s))
    for connection in connections:
        connection.close()


def compare(options: argparse.Namespace) -> None:
    servers = dict(server.split("=", 1) for server in options.servers)
    rates = {name: Rates() for name in servers}
    for number in range(-1, options.rounds):  # the first warms up
        for name, url in servers.items():
            asyncio.run(_round(url, options, number, rates[name] if number >= 0 else Rates()))
    first = statistics.median(next(iter(rates.values())).requests_per_s)
    print(f"{'server':<16}{'requests/s':>24}{'ratio':>8}{'p50 ms':>9}{'p99 ms':>9}{'streamed tokens/s':>20}")
    for name, rate in rates.items():
        middle, low, high = _spread(rate.requests_per_s)
        print(
            f"{name:<16}{f'{middle:.0f} ({low:.0f} to {high:.0f})':>24}{first / middle:>8.2f}"
            f"{statistics.median(rate.p50_ms):>9.1f}{statistics.median(rate.p99_ms):>9.1f}"
            f"{statistics.median(rate.tokens_per_s):>20.0f}"
        )
    print(json.dumps({"benchmark": "http_server", **vars(options), "rates": {n: vars(r) for n, r in rates.items()}}))


def _spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


# ------------------------------------------------------------------------------------------- CPU time, no server


_BODY = {"model": "idle", "messages": [{"role": "user", "content": "Say a few words about the weather."}]}


def measure_cpu(options: argparse.Namespace) -> None:
    """A request of one token against one of `--stream-tokens`, through the whole app: the slope is a token's cost. Then
    the parts of a streamed request of one token, each by itself."""
    from idle_engine import served_by_idle_engine

    with served_by_idle_engine() as post:
        few, many = 1, 1 + options.stream_tokens

        def posted(num_tokens: int, stream: bool) -> Callable[[], None]:
            return lambda: post({**_BODY, "max_tokens": num_tokens, "stream": stream})

        parts = _parts()
        works = {"whole": posted(few, False), "few": posted(few, True), "many": posted(many, True), **parts}
        costs: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(options.rounds):
            for name, work in works.items():
                costs[name].append(_cpu_s(work, options.requests) * 1e6)
    found = {name: min(values) for name, values in costs.items()}  # what else the machine does only adds to it
    found["token"] = (found["many"] - found["few"]) / options.stream_tokens
    print(f"chat request, one token, not streamed: {found['whole']:.0f} us of CPU; streamed: {found['few']:.0f} us")
    for name in parts:
        print(f"  {name:<52}{found[name]:6.0f} us")
    print(f"each streamed token: {found['token']:.1f} us")
    del found["many"]
    print(json.dumps({"benchmark": "http_cpu", "us": {name: round(value, 1) for name, value in found.items()}}))


def _parts() -> dict[str, Callable[[], Any]]:
    """The parts of a chat's way, in their order."""
    from idle_engine import idle_service

    from rayllm.api.answer import new_id
    from rayllm.api.body import parse_object
    from rayllm.api.openai.chat import ChatAnswer, prepare_chat
    from rayllm.api.protocol import ChatBody, read_body
    from rayllm.api.sampling import request_of_body, sampling_params
    from rayllm.prompt.chat import render

    model = idle_service().model()
    data = json.dumps({**_BODY, "max_tokens": 1, "stream": True}).encode()
    body = read_body(parse_object(data), ChatBody)
    prompt = render(body, model)

    chat = _run(prepare_chat(body, model, "", "chatcmpl-"))
    token_ids = chat.request.prompt_token_ids

    def make_request() -> None:
        params = sampling_params(body, model, max_tokens=1, logprobs=None, structured_outputs=None)
        request_of_body(new_id("chatcmpl-"), token_ids, params, body, model.config)

    async def answer_it() -> None:
        answer = ChatAnswer(model, body, chat)
        await answer.start()
        async for _ in answer.stream():
            pass
        answer.close()

    return {
        "body: JSON, unknown fields, pydantic": lambda: read_body(parse_object(data), ChatBody),
        "template": lambda: render(body, model),
        "tokens": lambda: model.tokenize(prompt, add_special_tokens=False, param="messages"),
        "parameters and request": make_request,
        "answer and its events": lambda: _run(answer_it()),
    }


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    """The result of what never waits: no event loop to pay for."""
    try:
        work.send(None)
    except StopIteration as end:
        found: _T = end.value
        return found
    raise AssertionError("it waits")


def _cpu_s(work: Callable[[], Any], num: int) -> float:
    """Seconds of CPU a call."""
    for _ in range(50):
        work()
    began_s = time.process_time()
    for _ in range(num):
        work()
    return (time.process_time() - began_s) / num


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="*", metavar="NAME=URL")
    parser.add_argument("--cpu", action="store_true", help="CPU time a request and a token, without a server")
    parser.add_argument("--model", default="default")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--stream-tokens", type=int, default=64)
    options = parser.parse_args()
    if options.cpu:
        measure_cpu(options)
    elif options.servers:
        compare(options)
    else:
        parser.error("name a server as NAME=URL, or give --cpu")


if __name__ == "__main__":
    main()
