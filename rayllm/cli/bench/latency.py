"""`rayllm bench latency`: how long one batch takes, from its prompts to its last token, without a server."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

from rayllm.cli.bench.stats import add_count_flags, check_at_least, percentile
from rayllm.cli.bench.throughput import ENGINE_FLAGS, engine_config
from rayllm.cli.bench.workload import random_workload
from rayllm.cli.flags import Parser, add_config_flags
from rayllm.config import EngineConfig

_PERCENTS = (10, 25, 50, 75, 90, 99)


def parser() -> Parser:
    made = Parser(
        prog="rayllm bench latency", description="Measure the latency of one batch of random prompts, repeatedly."
    )
    counts = (
        ("--input-len", 32, "tokens per prompt"),
        ("--output-len", 128, "tokens to generate per prompt"),
        ("--batch-size", 8, "prompts in the batch"),
        ("--num-iters-warmup", 2, "warm-up batches"),
        ("--num-iters", 10, "timed batches"),
        ("--seed", 0, "of the prompts"),
    )
    add_count_flags(made, counts)
    made.add_argument("--json", action="store_true", help="also print one line of JSON")
    add_config_flags(made, EngineConfig, only=ENGINE_FLAGS)
    return made


def run(argv: Sequence[str]) -> int:
    """Prints mean and percentiles, as vLLM does."""
    given = parser().parse(argv)
    stats = latency(given)
    print(f"Avg latency: {stats['avg_latency']} seconds")
    for percent, seconds in stats["percentiles"].items():
        print(f"{percent}% percentile latency: {seconds} seconds")
    if given.get("json"):
        print(json.dumps(stats))
    return 0


def latency(given: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each timed batch, and what follows from them."""
    check_at_least(given, 1, "input_len", "output_len", "batch_size", "num_iters")
    check_at_least(given, 0, "num_iters_warmup")
    engine = engine_config(given)

    from rayllm import LLM, SamplingParams
    from rayllm.engine.client.outputs import raise_failed
    from rayllm.engine.owner.resolve import resolve

    workload = random_workload(
        num_prompts=given["batch_size"],
        input_len=given["input_len"],
        output_len=given["output_len"],
        vocab_size=resolve(engine).shape.vocab_size,
        seed=given["seed"],
    )
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=given["output_len"], detokenize=False)
    # Else every batch after the first would find its prompts computed.
    settings = {
        **engine.model_dump(exclude_unset=True),
        "enable_prefix_caching": given.get("enable_prefix_caching", False),
    }
    elapsed = []
    with LLM(**settings) as llm:
        for _ in range(given["num_iters_warmup"] + given["num_iters"]):
            start = time.perf_counter()
            outputs = llm.generate(workload.prompts, params)
            elapsed.append(round(time.perf_counter() - start, 5))
            for output in outputs:
                raise_failed(output.outputs[0])
    timed = elapsed[given["num_iters_warmup"] :]
    return {
        "model": given.get("model", ""),
        **{name: given[name] for name in ("input_len", "output_len", "batch_size")},
        "avg_latency": round(statistics.fmean(timed), 5),
        "percentiles": {str(percent): round(percentile(timed, percent), 5) for percent in _PERCENTS},
        "latencies": timed,
    }
