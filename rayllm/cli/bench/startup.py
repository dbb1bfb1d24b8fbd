"""`rayllm bench startup`: from the command `rayllm serve` until the port opens, the server is ready and the first
token has come."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rayllm.cli.bench.stats import add_count_flags, check_at_least, headline, line
from rayllm.cli.flags import Parser
from rayllm.config import Environment
from rayllm.errors import EngineError

if TYPE_CHECKING:
    from rayllm.cli.client import ApiClient

_POLL_S = 0.02
_STOP_TIMEOUT_S = 60.0


def parser() -> Parser:
    made = Parser(
        prog="rayllm bench startup",
        description="Start a server, ask it for one token, stop it; flags of 'rayllm serve' come after '--'.",
    )
    add_count_flags(made, (("--num-iters", 3, "starts"), ("--timeout", 600, "time limit for one start, in seconds")))
    made.add_argument("--json", action="store_true", help="also print one line of JSON")
    return made


def run(argv: Sequence[str]) -> int:
    """Prints each start's times and their medians."""
    own, _, serve = _split(argv)
    given = parser().parse(own)
    check_at_least(given, 1, "num_iters", "timeout")
    starts = [one_start(serve, given["timeout"]) for _ in range(given["num_iters"])]
    names = {"port_open_s": "Port open", "ready_s": "Ready", "first_token_s": "First token"}
    print(headline("Startup Benchmark Result"))
    print(line("Starts:", str(len(starts))))
    for name, label in names.items():
        print(line(f"Median {label} (s):", statistics.median(start[name] for start in starts)))
        print(line(f"Slowest {label} (s):", max(start[name] for start in starts)))
    print(headline(""))
    if given.get("json"):
        print(json.dumps({"serve": serve, "starts": starts}))
    return 0


def _split(argv: Sequence[str]) -> tuple[list[str], str, list[str]]:
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut], "--", words[cut + 1 :]


def one_start(serve: Sequence[str], timeout_s: float) -> dict[str, float]:
    """Seconds after the command, of one server that is stopped again. `EngineError` where it does not come up."""
    from rayllm.cli.client import ApiClient
    from rayllm.executor.ray_cluster import free_port

    port = free_port()
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        command = [sys.executable, "-m", "rayllm", "serve", *serve, "--port", str(port)]
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        try:
            with ApiClient(f"http://127.0.0.1:{port}", Environment.api_key(), timeout_s) as client:
                return _watch(client, process, began, timeout_s)
        except EngineError as error:
            output.seek(0)
            said = output.read().decode(errors="replace").strip().splitlines()
            raise EngineError(f"{error}; its last output: {said[-1] if said else 'nothing'}") from None
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _watch(client: ApiClient, process: subprocess.Popen[bytes], began: float, timeout_s: float) -> dict[str, float]:
    from rayllm.cli.answer import Timing

    found: dict[str, float] = {}
    while True:
        stage = client.stage()
        if stage != "not reachable":
            found.setdefault("port_open_s", round(time.monotonic() - began, 3))
        if stage == "ready":
            break
        if process.poll() is not None:
            raise EngineError(f"rayllm serve ended with exit code {process.returncode}")
        if time.monotonic() - began > timeout_s:
            raise EngineError(f"rayllm serve was not ready within {timeout_s:g} s (last stage: {stage})")
        time.sleep(_POLL_S)
    found["ready_s"] = round(time.monotonic() - began, 3)
    params: dict[str, Any] = {"model": client.model(), "max_tokens": 1}
    for _ in client.stream_completion("Hello", params, Timing()):
        break
    found["first_token_s"] = round(time.monotonic() - began, 3)
    return found
