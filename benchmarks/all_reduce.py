"""All-reduce over the GPUs of this machine, by size: the two kernels against NCCL.

    python benchmarks/all_reduce.py [--ranks 2] [--device cuda] [--sizes 8192 65536 ...] [--repeat 50]

Microseconds of a bfloat16 sum in place, launched back to back, as the slowest rank saw it; the fastest way of each size
is what `SIZE_LIMITS` in `rayllm/distributed/all_reduce.py` should say. Without GPUs gloo alone is measured. Prints a
table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from rayllm.config import count_gpus
from rayllm.distributed.all_reduce import CustomAllReduce, SizeLimits
from rayllm.distributed.exchange import Exchange
from rayllm.executor.local_ranks import run_local_ranks

SIZES = [2**power for power in range(13, 27)]
ONE_SHOT_BYTES = 2**19
"""The most that the kernel takes."""
WAYS = {
    "one-shot": SizeLimits(ONE_SHOT_BYTES, ONE_SHOT_BYTES),
    "two-shot": SizeLimits(0, 2**24),
}
"""A custom all-reduce that takes one way for all that it takes."""
Times = dict[str, dict[int, float]]
"""Microseconds by way and bytes."""


def microseconds(reduce: Callable[[torch.Tensor], Any], x: torch.Tensor, repeat: int) -> float:
    """Of one of many in a row, after a few."""
    for _ in range(3):
        reduce(x)
    _wait(x)
    dist.barrier()
    began_s = time.perf_counter()
    for _ in range(repeat):
        reduce(x)
    _wait(x)
    return 1e6 * (time.perf_counter() - began_s) / repeat


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def measure(
    sizes: list[int], repeat: int, group: Any, rank: int, size: int, device: str
) -> dict[str, dict[int, float]]:
    """What this rank sees of each way and size."""
    logging.basicConfig(level=logging.INFO)  # where the kernels cannot be used, rank 0 says why
    where = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    messages = [torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=where) for num_bytes in sizes]
    library = "NCCL" if device == "cuda" else "gloo"
    found = {library: {x.nbytes: microseconds(dist.all_reduce, x, repeat) for x in messages}}
    for way, limits in WAYS.items() if device == "cuda" else ():
        custom = CustomAllReduce(rank, size, where, limits)
        custom.connect(Exchange(dist.PrefixStore(way, group.store), rank, size), one_node=True)
        taken = [x for x in messages if x.nbytes <= limits.two_shot_bytes and custom.reduce(x)]
        found[way] = {x.nbytes: microseconds(custom.reduce, x, repeat) for x in taken}
        custom.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=max(2, count_gpus()))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if count_gpus() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--repeat", type=int, default=50)
    options = parser.parse_args()
    by_rank = run_local_ranks(
        options.ranks, options.device, partial(measure, options.sizes, options.repeat), timeout_s=600.0
    )
    slowest = {
        way: {num_bytes: max(found[way][num_bytes] for found in by_rank) for num_bytes in times}
        for way, times in by_rank[0].items()
    }
    print(f"{'bytes':>10}" + "".join(f"{way:>12}" for way in slowest) + "  fastest")
    for num_bytes in options.sizes:
        times = {way: of_way[num_bytes] for way, of_way in slowest.items() if num_bytes in of_way}
        cells = "".join(f"{times[way]:>12.1f}" if way in times else f"{'':>12}" for way in slowest)
        print(f"{num_bytes:>10}{cells}  {min(times, key=lambda way: times[way])}")
    print(json.dumps({"benchmark": "all_reduce", **vars(options), "microseconds": slowest}))


if __name__ == "__main__":
    main()
