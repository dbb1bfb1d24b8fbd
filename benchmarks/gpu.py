"""Everything that can be measured on one GPU, in one process without Ray: each kernel's error and time against its
floor, decode steps, offline throughput, `transformers` beside it, and a killed worker. Prints one table; writes JSON.

    python benchmarks/gpu.py                       # one H200: under eight minutes
    python benchmarks/gpu.py --only kernels        # the sections whose names hold a word
    python benchmarks/gpu.py --smoke               # a CPU: tiny shapes, kernels in Triton's interpreter

It needs a checkout of this repository, torch, triton and transformers, and the packages that the engine imports; where
one is missing, the sections that need it say so and the others run. The exit code is 1 where a section failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUDGETS_S = {
    "decode steps": 100.0,
    "throughput": 100.0,
    "beside transformers": 75.0,
    "killed worker": 55.0,
}
"""Of the sections with whole models; each family of kernels has `KERNEL_BUDGET_S`. Under eight minutes in all."""
KERNEL_BUDGET_S = 12.0

_INTERPRETED = ("kernels", "decode steps")
"""Sections that with `--smoke` take the path of a GPU, in Triton's interpreter; the others take a CPU's."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU: shows that the script works")
    parser.add_argument(
        "--only", action="append", metavar="WORD", help="run only sections whose names hold WORD; may be repeated"
    )
    parser.add_argument("--json", default="gpu.json", metavar="FILE", help="where to write the figures (gpu.json)")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # JSON settings: see `gpu_models.Child`
    return parser.parse_args()


def sections(bench: Any) -> dict[str, tuple[float, Callable[[], Iterator[Any]]]]:
    """By name: seconds and what yields the rows."""
    import gpu_kernels
    import gpu_models

    found: dict[str, tuple[float, Callable[[], Iterator[Any]]]] = {
        name: (KERNEL_BUDGET_S, partial(kernel, bench)) for name, kernel in gpu_kernels.KERNELS.items()
    }
    models = {
        "decode steps": gpu_models.decode_steps,
        "throughput": gpu_models.throughput,
        "beside transformers": gpu_models.beside_transformers,
        "killed worker": gpu_models.killed_worker,
    }
    return {**found, **{name: (BUDGETS_S[name], partial(run, bench)) for name, run in models.items()}}


def versions() -> dict[str, str]:
    import torch
    import triton

    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    with contextlib.suppress(ImportError):
        import transformers

        found["transformers"] = transformers.__version__
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return found


def main() -> int:
    args = parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
    if args.child is not None:
        from gpu_models import run_child

        run_child(json.loads(args.child))
        return 0
    if args.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # shapes are too small to share
    import torch
    from gpu_bench import Bench
    from gpu_models import free
    from gpu_report import Report

    from rayllm_kernels.device import interpreted

    if not args.smoke and not torch.cuda.is_available():
        print("torch sees no GPU: give --smoke to run tiny shapes on the CPU", file=sys.stderr)
        return 2
    bench = Bench(torch.device("cpu") if args.smoke else torch.device("cuda", 0), args.smoke)
    report, began_s = Report(), time.perf_counter()
    found = versions()
    print(*(f"{name} {value}" for name, value in found.items()), sep=", ")
    for name, (budget_s, run) in sections(bench).items():
        if args.only is None or any(word in name for word in args.only):
            interprets = args.smoke and name.startswith(_INTERPRETED)
            with interpreted() if interprets else contextlib.nullcontext():
                report.run(name, budget_s * (10 if args.smoke else 1), run)
            free()
    elapsed_s = round(time.perf_counter() - began_s, 1)
    print(f"\n{report.text()}\n{elapsed_s:.0f} s in all; figures are in {args.json}")
    whole = {"bench": "gpu", "versions": found, "smoke": args.smoke, "elapsed_s": elapsed_s, **report.as_json()}
    Path(args.json).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
