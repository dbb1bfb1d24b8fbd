"""RayLLM against `transformers` generate, in one run: rounds in alternation, each backend in a process of its own.

    python benchmarks/throughput.py --rounds 3 --model random:qwen2-0.5b --dtype bfloat16

Every other argument goes to `rayllm bench throughput` as it is. Prints a table (median over rounds, smallest and
largest), the ratio of each round, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

BACKENDS = ("rayllm", "hf")


def measure(backend: str, arguments: list[str]) -> dict[str, Any]:
    """One run of one backend; its results."""
    command = [sys.executable, "-m", "rayllm", "bench", "throughput", "--backend", backend, "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    given, arguments = parser.parse_known_args()
    runs: dict[str, list[dict[str, Any]]] = {backend: [] for backend in BACKENDS}
    for number in range(given.rounds):
        for backend in BACKENDS:
            results = measure(backend, arguments)
            runs[backend].append(results)
            print(f"round {number + 1}: {backend} {results['tokens_per_second']:.1f} tokens/s", file=sys.stderr)
    speeds = {backend: [results["tokens_per_second"] for results in runs[backend]] for backend in BACKENDS}
    ratios = [ours / theirs for ours, theirs in zip(speeds["rayllm"], speeds["hf"], strict=True)]
    print("| backend | tokens/s, median (min to max) |\n|---|---|")
    for backend, values in speeds.items():
        print(f"| {backend} | {statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f}) |")
    print(f"| ratio | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")
    summary = {
        "benchmark": "throughput",
        "arguments": arguments,
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "runs": runs,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
