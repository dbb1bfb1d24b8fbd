"""What it costs to say a step: driver -> worker processes -> rank 0's answer, with plans as a decode step has them.

    python benchmarks/step_channel.py [--ranks 2] [--steps 4000] [--transport unix|tcp] [--depth 1]

The workers are real processes round the real `serve_plans`, on a runner that computes nothing. Depth 1 is the round
trip; with depth 2 the next plan is sent before a result is taken, and the figure is the time of a step. Prints a table
and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import secrets
import statistics
import time
from collections.abc import Callable
from typing import Any

from rayllm.executor.channel import Address, Listener, connect
from rayllm.executor.fanout import WorkerLinks
from rayllm.executor.plan_server import serve_plans
from rayllm.messages import StepPlan, StepResult
from rayllm.request import pack_ids

_WARM_UP_STEPS = 200
_BLOCK_SIZE = 16


class _IdleRunner:
    """Answers a token for each row of the plan, at once."""

    def num_blocks_available(self) -> int:
        return 0

    def start(self, num_blocks: int) -> None:
        pass

    def warm_up(self) -> None:
        pass

    def execute(self, plan: StepPlan) -> StepResult:
        return StepResult(plan.step, plan.epoch, plan.rows, plan.rows, {}, {}, 0.0)


def _work(rank: int, address: Address, token: str) -> None:
    serve_plans(_IdleRunner(), rank, connect(address, token, str(rank), "the driver"), answers=rank == 0)


def _start(ranks: int, transport: str) -> tuple[WorkerLinks, list[Any]]:
    token = secrets.token_hex(16)
    listener = Listener(token, "127.0.0.1" if transport == "tcp" else None)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(rank, listener.address, token)) for rank in range(ranks)]
    for process in processes:
        process.start()
    channels = [listener.accept(60.0) for _ in processes]
    listener.close()
    return WorkerLinks(sorted(channels, key=lambda channel: int(channel.peer))), processes


def decode_plan(step: int, num_rows: int) -> StepPlan:
    """A step in which every row gets one token, and one row in `_BLOCK_SIZE` a new block."""
    grown = range(step % _BLOCK_SIZE, num_rows, _BLOCK_SIZE)
    return StepPlan(
        step=step,
        epoch=0,
        finished_rows=b"",
        new_rows=[],
        grown_rows=pack_ids(grown),
        grown_blocks=pack_ids([1000 + row for row in grown]),
        rows=pack_ids(range(num_rows)),
        counts=pack_ids([1] * num_rows),
        num_tokens=num_rows,
    )


def _measure(links: WorkerLinks, num_rows: int, num_steps: int, depth: int) -> list[float]:
    """Microseconds of each step, as the driver sees it: plan built outside, sent, result taken."""
    plans = [decode_plan(step, num_rows) for step in range(_WARM_UP_STEPS + num_steps)]
    times_us: list[float] = []
    for plan in plans[: depth - 1]:
        links.send(plan)
    clock: Callable[[], int] = time.perf_counter_ns
    for plan in plans[depth - 1 :]:
        began = clock()
        links.send(plan)
        links.receive(10.0)
        times_us.append((clock() - began) / 1e3)
    for _ in range(depth - 1):
        links.receive(10.0)
    return times_us[_WARM_UP_STEPS:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--transport", choices=["unix", "tcp"], default="unix")
    parser.add_argument("--depth", type=int, choices=[1, 2], default=1)
    arguments = parser.parse_args()

    links, processes = _start(arguments.ranks, arguments.transport)
    report: dict[str, Any] = {"benchmark": "step_channel", **vars(arguments)}
    print(f"{'rows':>5} {'p50 us':>8} {'p99 us':>8} {'mean us':>8}")
    for num_rows in (25, 256):
        times_us = sorted(_measure(links, num_rows, arguments.steps, arguments.depth))
        p50, p99 = times_us[len(times_us) // 2], times_us[int(len(times_us) * 0.99)]
        mean = statistics.fmean(times_us)
        print(f"{num_rows:>5} {p50:>8.1f} {p99:>8.1f} {mean:>8.1f}")
        report[f"rows_{num_rows}"] = {"p50_us": round(p50, 1), "p99_us": round(p99, 1), "mean_us": round(mean, 1)}
    links.close()
    for process in processes:
        process.join()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
