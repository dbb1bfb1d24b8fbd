"""`rayllm bench serve`: what the clients of an OpenAI-compatible server see while requests arrive as they do in life.

Open loop: a request is sent when its time has come, whether or not earlier ones are answered (`--max-concurrency`
bounds that). Latencies are the client's, from the sending of a request.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rayllm.cli.addresses import http_settings, server_url
from rayllm.cli.bench.stats import add_count_flags, check_at_least, headline, line, spread_ms
from rayllm.cli.connect import add_server_flags
from rayllm.cli.flags import Parser, UsageError
from rayllm.config import Environment
from rayllm.errors import EngineUnreachableError, RayLLMError

if TYPE_CHECKING:
    import httpx

_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend"
)
_WORDS = tuple(_TEXT.split(" "))
_TIMEOUT_S = 3600.0
_CONNECT_TIMEOUT_S = 10.0
_NUM_FITS = 4


@dataclass
class Sample:
    """One request as its client saw it, in seconds after it was sent."""

    chunk_s: list[float] = field(default_factory=list)
    """When each piece of text came."""
    end_s: float = 0.0
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    error: str = ""


def parser() -> Parser:
    made = Parser(prog="rayllm bench serve", description="Measure an OpenAI-compatible server under load.")
    add_server_flags(made)
    counts = (
        ("--num-prompts", 100, "requests"),
        ("--input-len", 64, "approximate tokens per prompt"),
        ("--output-len", 128, "tokens per response"),
        ("--seed", 0, "of prompts and arrivals"),
    )
    add_count_flags(made, counts)
    made.add_argument(
        "--request-rate",
        type=float,
        default=float("inf"),
        metavar="R",
        help="requests per second, with Poisson arrivals (default: inf, all at once)",
    )
    made.add_argument(
        "--max-concurrency", type=int, metavar="N", help="maximum number of open requests (default: no limit)"
    )
    made.add_argument(
        "--no-ignore-eos", action="store_true", help="let responses end early (for servers without ignore_eos)"
    )
    made.add_argument("--json", action="store_true", help="also print one line of JSON")
    return made


def run(argv: Sequence[str]) -> int:
    """Prints results in vLLM's form; 1 when some request failed."""
    given = parser().parse(argv)
    check_at_least(given, 1, "num_prompts", "input_len", "output_len")
    if not given["request_rate"] > 0:
        raise UsageError(f"--request-rate {given['request_rate']} must be more than 0")
    if given.get("max_concurrency", 1) < 1:
        raise UsageError(f"--max-concurrency {given['max_concurrency']} must be at least 1")
    samples, elapsed_s = asyncio.run(_measure(given))
    stats = summarize(samples, elapsed_s, given)
    _print(stats)
    if given.get("json"):
        print(json.dumps(stats))
    failed = [sample.error for sample in samples if sample.error]
    if failed:
        print(f"{len(failed)} requests failed; first error: {failed[0]}", file=sys.stderr)
    return 1 if failed else 0


# ------------------------------------------------------------------------------------------------------- measuring


async def _measure(given: dict[str, Any]) -> tuple[list[Sample], float]:
    import httpx

    url = server_url(given.get("url"))
    key = given.get("api_key") or Environment.api_key()
    async with httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        **http_settings(url),
    ) as http:
        model = given.get("served_model_name") or await _first_model(http, url)
        numbers = random.Random(given["seed"])
        prompts = await _prompts(http, model, given, numbers)
        body = {"model": model, "max_tokens": given["output_len"], "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if not given.get("no_ignore_eos"):
            body["ignore_eos"] = True
        warm = await _ask(http, {**body, "prompt": prompts[0], "max_tokens": 1})
        if warm.error:
            raise RayLLMError(f"the server at {url} refuses the benchmark's requests: {warm.error}")
        return await _send_all(http, body, prompts, given, numbers)


async def _send_all(
    http: httpx.AsyncClient, body: dict[str, Any], prompts: Sequence[str], given: dict[str, Any], numbers: random.Random
) -> tuple[list[Sample], float]:
    places = asyncio.Semaphore(given.get("max_concurrency") or len(prompts))

    async def one(prompt: str) -> Sample:
        async with places:
            return await _ask(http, {**body, "prompt": prompt})

    began = time.perf_counter()
    tasks = []
    due_s = 0.0
    for prompt in prompts:
        await asyncio.sleep(max(0.0, began + due_s - time.perf_counter()))
        tasks.append(asyncio.create_task(one(prompt)))
        if given["request_rate"] != float("inf"):
            due_s += numbers.expovariate(given["request_rate"])
    samples = await asyncio.gather(*tasks)
    return samples, time.perf_counter() - began


async def _first_model(http: httpx.AsyncClient, url: str) -> str:
    import httpx as library

    from rayllm.cli.client import refusal

    try:
        answer = await http.get("/v1/models")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except library.HTTPStatusError as error:
        raise refusal(error.response, url) from None
    except (library.HTTPError, library.InvalidURL):
        raise EngineUnreachableError(
            f"no server answers at {url}: start one with 'rayllm serve', or give another --url"
        ) from None
    except (ValueError, KeyError, IndexError):
        raise RayLLMError(f"{url} does not list its models as an OpenAI server does") from None


async def _prompts(http: httpx.AsyncClient, model: str, given: dict[str, Any], numbers: random.Random) -> list[str]:
    """Random words, as many as make `input_len` tokens where the server has `/tokenize`, else that many words."""
    num_words = given["input_len"]
    for _ in range(_NUM_FITS):
        text = " ".join(_WORDS[number % len(_WORDS)] for number in range(num_words))
        answer = await http.post("/tokenize", json={"model": model, "prompt": text})
        count = answer.json().get("count") if answer.is_success else None
        if not count or count == given["input_len"]:
            break
        num_words = max(1, round(num_words * given["input_len"] / count))
    return [" ".join(numbers.choices(_WORDS, k=num_words)) for _ in range(given["num_prompts"])]


async def _ask(http: httpx.AsyncClient, body: dict[str, Any]) -> Sample:
    import httpx as library

    sample, began = Sample(), time.perf_counter()
    try:
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.is_error:
                await answer.aread()
                sample.error = f"{answer.status_code}: {answer.text[:300]}"
            else:
                await _follow(answer.aiter_lines(), sample, began)
    except (library.HTTPError, ValueError, KeyError) as error:
        sample.error = f"{type(error).__name__}: {error}"
    sample.end_s = time.perf_counter() - began
    if not sample.error and not sample.chunk_s:
        sample.error = "the response has no text"
    return sample


async def _follow(lines: AsyncIterator[str], sample: Sample, began: float) -> None:
    async for text in lines:
        if not text.startswith("data:") or (data := text[5:].strip()) == "[DONE]":
            continue
        now_s = time.perf_counter() - began
        event = json.loads(data)
        if "error" in event:
            sample.error = str(event["error"])
        if usage := event.get("usage"):
            sample.num_prompt_tokens = usage.get("prompt_tokens") or 0
            sample.num_tokens = usage.get("completion_tokens") or 0
        if event.get("choices"):
            sample.chunk_s.append(now_s)


# --------------------------------------------------------------------------------------------------------- results


def summarize(samples: Sequence[Sample], elapsed_s: float, given: dict[str, Any]) -> dict[str, Any]:
    """Totals, rates and latencies, named as in vLLM's JSON results."""
    good = [sample for sample in samples if not sample.error]
    num_input, num_output = sum(s.num_prompt_tokens for s in good), sum(s.num_tokens for s in good)
    gaps = [later - earlier for s in good for earlier, later in zip(s.chunk_s, s.chunk_s[1:], strict=False)]
    per_token = [(s.chunk_s[-1] - s.chunk_s[0]) / (s.num_tokens - 1) for s in good if s.num_tokens > 1]
    rate = given["request_rate"]
    return {
        "request_rate": rate if rate != float("inf") else "inf",
        "max_concurrency": given.get("max_concurrency"),
        "completed": len(good),
        "failed": len(samples) - len(good),
        "duration": round(elapsed_s, 3),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": round(len(good) / elapsed_s, 3),
        "output_throughput": round(num_output / elapsed_s, 2),
        "total_token_throughput": round((num_input + num_output) / elapsed_s, 2),
        "mean_concurrency": round(sum(sample.end_s for sample in good) / elapsed_s, 2),
        **spread_ms("ttft", [sample.chunk_s[0] for sample in good]),
        **spread_ms("tpot", per_token),
        **spread_ms("itl", gaps),
        **spread_ms("e2el", [sample.end_s for sample in good]),
    }


_TOTALS = (
    ("Successful requests:", "completed"),
    ("Failed requests:", "failed"),
    ("Request rate (req/s):", "request_rate"),
    ("Maximum concurrency:", "max_concurrency"),
    ("Mean concurrency:", "mean_concurrency"),
    ("Benchmark duration (s):", "duration"),
    ("Total input tokens:", "total_input_tokens"),
    ("Total generated tokens:", "total_output_tokens"),
    ("Request throughput (req/s):", "request_throughput"),
    ("Output token throughput (tok/s):", "output_throughput"),
    ("Total Token throughput (tok/s):", "total_token_throughput"),
)
_LATENCIES = (
    ("Time to First Token", "TTFT"),
    ("Time per Output Token (excl. 1st token)", "TPOT"),
    ("Inter-token Latency", "ITL"),
    ("End-to-end Latency", "E2EL"),
)


def _print(stats: dict[str, Any]) -> None:
    print(headline("Serving Benchmark Result"))
    for label, name in _TOTALS:
        if stats[name] is not None:
            print(line(label, stats[name]))
    for title, short in _LATENCIES:
        print(headline(title, "-"))
        for kind in ("Mean", "Median", "P90", "P99"):
            print(line(f"{kind} {short} (ms):", float(stats[f"{kind.lower()}_{short.lower()}_ms"])))
    print(headline(""))
