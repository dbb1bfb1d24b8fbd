"""`rayllm demo`: Ray, Serve, a driver and two tensor-parallel workers, one question over HTTP, one streamed answer."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rayllm.cli.flags import Parser
from rayllm.config import EngineConfig, ServerConfig, parse_settings

if TYPE_CHECKING:
    from rayllm.cli.answer import Timing
    from rayllm.cli.client import ApiClient
    from rayllm.cli.terminal import Screen
    from rayllm.serve.running_server import RunningServer

DEFAULT_QUESTION = "What is RayLLM?"
_MAX_TOKENS = 128


def parser() -> Parser:
    made = Parser(
        prog="rayllm demo",
        description="Serve the built-in model with two workers, ask it a question, and stop everything again.",
    )
    made.add_argument("--question", metavar="TEXT", help=f"default: {DEFAULT_QUESTION}")
    made.add_argument(
        "--kill",
        metavar="RANK",
        nargs="?",
        const="",
        help="kill a worker (this rank, or a random one) during the stream, and show the recovery",
    )
    made.add_argument("--tensor-parallel-size", "-tp", metavar="SIZE", help="worker processes (default: 2)")
    made.add_argument("--json", action="store_true", help="print one line of JSON instead")
    return made


def run(argv: Sequence[str]) -> int:
    """Prints the answer as it streams, then how fast it was and what ran where; leaves no process behind."""
    given = parser().parse(argv)
    engine, server = demo_configs(given.get("tensor_parallel_size"))

    from rayllm.cli.demo_kill import QUESTION, chosen_rank
    from rayllm.cli.serving import check_before_start, foreground_server

    rank = None
    if "kill" in given:
        rank = chosen_rank(given["kill"], engine.tensor_parallel_size)
        engine = engine.model_copy(update={"standby": "process"})
        server = server.model_copy(update={"enable_fault_injection": True})

    check_before_start(engine, server)
    started = time.monotonic()
    as_json = bool(given.get("json"))
    with foreground_server("demo", engine, server, quiet=as_json) as (screen, running):
        question = given.get("question", DEFAULT_QUESTION if rank is None else QUESTION)
        report = _ask(screen, running, question, as_json, started, rank)
    if as_json:
        print(json.dumps(report))
    else:
        print("all processes have been stopped; next: rayllm serve, then rayllm chat")
    return 0 if report.get("kill", {}).get("same_as_undisturbed", True) else 1


def demo_configs(size: str | int | None) -> tuple[EngineConfig, ServerConfig]:
    """The built-in model on as many workers as asked for, by default two where the machine has two cores. GPUs are
    used where there is one a worker."""
    from rayllm.config import count_cores, count_gpus

    engine, server = parse_settings({"tensor_parallel_size": size or min(2, count_cores()), "port": 0})
    device = "cuda" if count_gpus() >= engine.tensor_parallel_size else "cpu"
    return engine.model_copy(update={"device": device}), server


def _ask(
    screen: Screen, running: RunningServer, question: str, as_json: bool, started: float, rank: int | None
) -> dict[str, Any]:
    """Asks, and kills worker `rank` meanwhile; None: no worker."""
    from rayllm.cli.answer import Timing
    from rayllm.cli.client import ApiClient
    from rayllm.cli.demo_kill import kill_report, killed_lines, stream_and_kill, wait_for_standby

    has_standby = rank is not None and wait_for_standby(screen, running)
    screen.end_stages()
    ready_s = time.monotonic() - started
    timing = Timing()
    if not as_json:
        screen.print(f"\nPOST {running.url}/v1/chat/completions\n> {question}\n")
    messages = [{"role": "user", "content": question}]
    killed: dict[str, Any] = {}
    with ApiClient(running.url) as client:
        params = {
            "model": client.model(),
            "temperature": 0,
            "max_tokens": _MAX_TOKENS if rank is None else 2 * _MAX_TOKENS,
        }
        if rank is None:
            answer = _stream(screen, client, messages, params, timing, quiet=as_json)
        else:
            seen = stream_and_kill(screen, client, messages, params, timing, rank, quiet=as_json)
            answer, killed = seen.text, kill_report(client, running, seen, messages, params)
    report = _report(running, timing, question, answer, ready_s)
    if not as_json:
        _show(screen, report, timing, killed_lines(killed, report, has_standby=has_standby) if killed else ())
    return {**report, "kill": killed} if killed else report


def _stream(
    screen: Screen,
    client: ApiClient,
    messages: list[dict[str, str]],
    params: dict[str, Any],
    timing: Timing,
    *,
    quiet: bool,
) -> str:
    parts = []
    for piece in client.stream_chat(messages, params, timing):
        parts.append(piece.text)
        if not quiet:
            screen.print(piece.text, end="")
    return "".join(parts)


def _show(screen: Screen, report: dict[str, Any], timing: Timing, killed: Sequence[str]) -> None:
    screen.print(f"\n\nready after {report['ready_s']:.1f} s; {timing}\n")
    for row in report["processes"]:
        screen.print(f"  {row['role']:<14} pid {row['pid']:<8} {row['host']:<15} {row['devices']}")
    screen.print()
    for line in killed:
        screen.print(line)
    if killed:
        screen.print()


def _report(running: RunningServer, timing: Timing, question: str, answer: str, ready_s: float) -> dict[str, Any]:
    engine = running.describe()
    workers = [(f"worker rank {rank}", place) for rank, place in enumerate(engine.workers)]
    rows = [("ingress", running.ingress_place()), ("driver", engine.driver), *workers]
    return {
        "question": question,
        "answer": answer,
        "model": engine.served_model_name,
        "url": running.url,
        "ready_s": round(ready_s, 3),
        "first_token_s": timing.first_token_s and round(timing.first_token_s, 4),
        "tokens_per_s": timing.tokens_per_s and round(timing.tokens_per_s, 2),
        "num_tokens": timing.num_tokens,
        "tensor_parallel_size": running.engine.tensor_parallel_size,
        "processes": [
            {"role": role, "pid": place.pid, "host": place.host, "devices": ", ".join(place.devices)}
            for role, place in rows
        ],
    }
