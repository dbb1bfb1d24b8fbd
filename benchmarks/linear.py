"""Matrix products of 16-bit floats on a CPU that has no instructions for them: torch's own against ours in float32.

    python benchmarks/linear.py [--dtype bfloat16] [--rows 1 2 4 8 32 128 512] [--num-threads 1] [--repeat 5]

CPU milliseconds (so that other work beside it counts little), the two in turn, for weights of Qwen2-0.5B's shapes; a
ratio above 1 is ours faster. Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from rayllm.linear.widened import WidenedLinear, widened_product

SHAPES = {"attention": (896, 896), "up": (9728, 896), "down": (896, 4864), "vocabulary": (32000, 896)}


def cpu_ms(product: Callable[[], torch.Tensor]) -> float:
    began_s = time.process_time()
    product()
    return 1e3 * (time.process_time() - began_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 32, 128, 512])
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    dtype = getattr(torch, options.dtype)
    if not WidenedLinear.supports(torch.ones(1, 1, dtype=dtype)):
        print(f"this CPU multiplies {options.dtype} by itself: the layers do not widen it here")
    ratios: dict[str, dict[int, float]] = {}
    print(f"{'weight':<12}{'rows':>6}{'torch ms':>12}{'widened ms':>12}{'ratio':>8}")
    for name, shape in SHAPES.items():
        weight = torch.randn(shape).to(dtype)
        for num_rows in options.rows:
            x = torch.randn(num_rows, shape[1]).to(dtype)
            pairs = [
                (cpu_ms(lambda: F.linear(x, weight)), cpu_ms(lambda: widened_product(x, weight, None)))  # noqa: B023
                for _ in range(options.repeat + 1)
            ][1:]
            own, widened = (statistics.median(times) for times in zip(*pairs, strict=True))
            ratios.setdefault(name, {})[num_rows] = round(own / widened, 2)
            print(f"{name:<12}{num_rows:>6}{own:>12.2f}{widened:>12.2f}{own / widened:>8.2f}")
    print(json.dumps({"benchmark": "linear", **vars(options), "ratios": ratios}))


if __name__ == "__main__":
    main()
