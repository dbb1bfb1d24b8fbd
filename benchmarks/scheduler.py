"""What planning costs: time spent in `plan` and `commit` for each step of decoding. One JSON line.

Workers are left out: results are made up between the timed calls. `--seqs` sequences decode at once, with two
plans out; each passes block borders (growth, hashing, publishing) in its turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time

from rayllm.kv_layout import kv_spans
from rayllm.messages import StepPlan, StepResult
from rayllm.request import Request, SamplingParams, pack_ids
from rayllm.scheduler.scheduler import Scheduler

TOKEN = 1000


def build(num_seqs: int, prompt_len: int, num_steps: int, block_size: int, prefix_caching: bool) -> Scheduler:
    max_model_len = prompt_len + num_steps
    limits = {"max_model_len": max_model_len + 1, "max_num_batched_tokens": 8192}
    spans = kv_spans([None], block_size=block_size, max_inflight_steps=2, **limits)
    scheduler = Scheduler(
        num_blocks=num_seqs * (max_model_len // block_size + 2) * 102 // 100,
        kv_spans=spans,
        max_num_seqs=num_seqs,
        **limits,
        enable_prefix_caching=prefix_caching,
        eos_token_ids=frozenset({2}),
    )
    rng = random.Random(0)
    params = SamplingParams(max_tokens=num_steps)
    for index in range(num_seqs):
        length = rng.randint(prompt_len // 2, prompt_len)  # so that block borders are spread over the steps
        prompt = pack_ids(rng.randrange(3, 32000) for _ in range(length))
        scheduler.add(Request(request_id=str(index), prompt=prompt, params=params, seed=index, max_tokens=num_steps))
    return scheduler


def answer(plan: StepPlan, rows: bytes) -> StepResult:
    tokens = pack_ids([TOKEN]) * (len(rows) // 4)
    return StepResult(plan.step, plan.epoch, rows, tokens, {}, {}, 0.0)


def prefill(scheduler: Scheduler, num_seqs: int) -> tuple[float, int]:
    """Runs until every sequence decodes; seconds in the scheduler, and steps."""
    spent_s, num_steps = 0.0, 0
    while True:
        start = time.perf_counter()
        plan = scheduler.plan()
        spent_s += time.perf_counter() - start
        assert plan is not None
        rows = pack_ids(sequence.row for sequence in scheduler._in_flight[0].by_row.values() if sequence.num_pending)
        start = time.perf_counter()
        scheduler.commit(answer(plan, rows))
        spent_s += time.perf_counter() - start
        num_steps += 1
        if len(rows) // 4 == num_seqs:
            return spent_s, num_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seqs", type=int, default=256)
    parser.add_argument("--prompt-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--no-prefix-caching", action="store_true")
    args = parser.parse_args()

    scheduler = build(args.seqs, args.prompt_len, args.steps + 64, args.block_size, not args.no_prefix_caching)
    prefill_s, num_prefill_steps = prefill(scheduler, args.seqs)
    out = [scheduler.plan()]
    plan_s, commit_s = [], []
    for _ in range(args.steps):
        start = time.perf_counter()
        plan = scheduler.plan()
        plan_s.append(time.perf_counter() - start)
        assert plan is not None
        assert out[0] is not None
        result = answer(out[0], out[0].rows)
        out = [plan]
        start = time.perf_counter()
        scheduler.commit(result)
        commit_s.append(time.perf_counter() - start)
    step_s = sorted(a + b for a, b in zip(plan_s, commit_s))
    print(
        json.dumps(
            {
                "benchmark": "scheduler",
                "num_seqs": args.seqs,
                "block_size": args.block_size,
                "prefix_caching": not args.no_prefix_caching,
                "num_steps": args.steps,
                "plan_ms_median": round(1e3 * statistics.median(plan_s), 4),
                "commit_ms_median": round(1e3 * statistics.median(commit_s), 4),
                "step_ms_median": round(1e3 * statistics.median(step_s), 4),
                "step_ms_p99": round(1e3 * step_s[len(step_s) * 99 // 100], 4),
                "step_us_per_sequence": round(1e6 * statistics.median(step_s) / args.seqs, 3),
                "admission_us_per_sequence": round(1e6 * prefill_s / args.seqs, 1),
                "num_prefill_steps": num_prefill_steps,
                "python": platform.python_version(),
            }
        )
    )


if __name__ == "__main__":
    main()
