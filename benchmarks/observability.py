"""What metrics, logs and traces cost, in microseconds of one core: for a token, a step, a request, a scrape.

    python benchmarks/observability.py [--number 20000]

Best of five rounds, with nothing else of the engine running. Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path

from rayllm.messages import EngineStats, Times
from rayllm.observability.declared import ITERATION_EDGES, STEP_EDGES_S
from rayllm.observability.histogram import Histogram
from rayllm.observability.logs import setup_logging
from rayllm.observability.metrics import Metrics


def microseconds(work: Callable[[], object], number: int) -> float:
    return min(timeit.repeat(work, number=number, repeat=5)) / number * 1e6


def results(number: int, folder: Path) -> dict[str, float]:
    metrics = Metrics("model")
    step_tokens, step_gaps = Histogram(ITERATION_EDGES), Histogram(STEP_EDGES_S)
    log = logging.getLogger("rayllm.benchmark")
    fields = {"method": "POST", "path": "/v1/completions", "status": 200, "duration_ms": 12.3}

    def token() -> None:
        metrics.tokens_generated(1)
        metrics.next_token(0.012)

    def step() -> None:
        step_tokens.observe(32)
        step_gaps.observe(0.0002)

    def request() -> None:
        metrics.request_opened()
        metrics.first_token(0.1, Times(0.05, 0.05))
        metrics.prompt_done(100, 20, 1)
        metrics.choice_finished("stop", 50, 100, elapsed_s=1.0, decode_s=0.9, prefill_s=0.05)
        metrics.request_finished(50)
        metrics.answered("/v1/completions", "POST", 200)
        metrics.request_closed()

    def line() -> None:
        log.info("POST /v1/completions 200", extra={"fields": fields, "request_id": "req-1"})

    stats = EngineStats(0, True, "", 1, 1, 100, 50, 400, 0, 0, 0, 0, 0, 0, 0.0, step_tokens=step_tokens.snapshot())
    found = {
        "metrics, a token": microseconds(token, number),
        "metrics, a step (driver)": microseconds(step, number),
        "metrics, a request": microseconds(request, number),
        "a scrape of /metrics": microseconds(lambda: metrics.render(stats), max(1, number // 500)),
    }
    for form in ("text", "json"):
        setup_logging(form, process="ingress", file=str(folder / form))  # type: ignore[arg-type]
        found[f"a log line, {form}"] = microseconds(line, number // 10)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=20000)
    with tempfile.TemporaryDirectory() as folder:
        found = results(parser.parse_args().number, Path(folder))
    for name, value in found.items():
        print(f"{name:<26} {value:10.2f} us")
    print(json.dumps({"benchmark": "observability", "us": {name: round(value, 2) for name, value in found.items()}}))


if __name__ == "__main__":
    main()
