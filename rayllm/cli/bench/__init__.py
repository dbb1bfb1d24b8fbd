"""`rayllm bench`: how fast it is, as users of other engines measure it."""

from __future__ import annotations

from collections.abc import Sequence

from rayllm.cli.subcommands import run_subcommand

SUBCOMMANDS = {
    "throughput": ("rayllm.cli.bench.throughput", "offline throughput: requests and tokens per second"),
    "latency": ("rayllm.cli.bench.latency", "latency of a single batch"),
    "serve": ("rayllm.cli.bench.serve", "latencies that clients of a running server see: TTFT, TPOT, ITL, E2E"),
    "startup": ("rayllm.cli.bench.startup", "seconds from the command to the first token"),
}


def run(argv: Sequence[str]) -> int:
    """Runs the benchmark that is named first."""
    return run_subcommand("bench", SUBCOMMANDS, argv)
