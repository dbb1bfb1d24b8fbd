"""A mixture's experts on a CPU, three ways: a layer of its own for each expert that has rows (ours), one tensor for all
experts and a product for each that has rows, and one batched product with the rows of each expert padded to the most.

    python benchmarks/moe.py [--dtype float32 bfloat16] [--experts 60] [--top-k 4] [--width 2048] [--inner 1408]
                             [--rows 1 25 512] [--num-threads 1] [--repeat 3]

CPU milliseconds of one layer (so that other work beside it counts little), the three in turn, with random choices of
experts; the default sizes are those of Qwen1.5-MoE-A2.7B. Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rayllm.distributed.groups import TensorParallel
from rayllm.layers.moe import Experts
from rayllm.linear import ExpertLinear, StackedExperts
from rayllm.linear.gated import gated
from rayllm.spec import ExpertSpec, RouterSpec, SparseMlpSpec
from rayllm.weights.source import DummyWeights, ExpertPart, Outputs

WAYS = ("separate", "stacked", "batched")


class OneTensorExperts(ExpertLinear):
    """A product for each expert that has rows, of slices of one tensor."""

    def __init__(self, weight_EOI: Tensor, activation: str | None = None):
        self._weight, self._activation = weight_EOI, activation

    def __call__(self, x_NI: Tensor, counts: Sequence[int]) -> Tensor:
        rows = x_NI.split(list(counts))
        out = torch.cat([F.linear(rows[expert], self._weight[expert]) for expert, count in enumerate(counts) if count])
        return out if self._activation is None else gated(out, self._activation)


class BatchedExperts(ExpertLinear):
    """One batched product over the experts that have rows, each padded to the most rows of one."""

    def __init__(self, weight_EOI: Tensor, activation: str | None = None):
        self._weight, self._activation = weight_EOI, activation

    def __call__(self, x_NI: Tensor, counts: Sequence[int]) -> Tensor:
        active = [expert for expert, count in enumerate(counts) if count]
        padded = x_NI.new_zeros(len(active), max(counts), x_NI.shape[1])
        for place, (expert, rows) in enumerate(zip(active, x_NI.split([counts[expert] for expert in active]))):
            padded[place, : counts[expert]] = rows
        products = torch.bmm(padded, self._weight[active].transpose(1, 2))
        out = torch.cat([products[place, : counts[expert]] for place, expert in enumerate(active)])
        return out if self._activation is None else gated(out, self._activation)


class BenchmarkWeights(DummyWeights):
    """Random experts, stored in one of the ways."""

    def __init__(self, way: str, dtype: torch.dtype):
        super().__init__(0, dtype, torch.device("cpu"))
        self._kind = BatchedExperts if way == "batched" else OneTensorExperts
        self._separate = way == "separate"

    def expert_linear(
        self, outputs: Outputs, num_inputs: int, experts: ExpertPart, **options: object
    ) -> ExpertLinear | StackedExperts:
        if self._separate:
            return super().expert_linear(outputs, num_inputs, experts, **options)  # type: ignore[arg-type]
        return self._kind(self._stack(num_inputs, experts, outputs))

    def expert_gated_linear(
        self, gate: Outputs, up: Outputs, num_inputs: int, experts: ExpertPart, activation: str, **options: object
    ) -> ExpertLinear | StackedExperts:
        if self._separate:
            return super().expert_gated_linear(gate, up, num_inputs, experts, activation)
        return self._kind(self._stack(num_inputs, experts, gate, up), activation)

    def _stack(self, num_inputs: int, experts: ExpertPart, *outputs: Outputs) -> Tensor:
        parts = [
            torch.stack(list(self.expert_tensors(f"{each.module}.weight", shape, experts.held)))
            for each in outputs
            for shape in [(experts.total, each.size, num_inputs)]
        ]
        return torch.cat(parts, dim=1)


def cpu_ms(layer: Callable[[], Tensor]) -> float:
    began_s = time.process_time()
    layer()
    return 1e3 * (time.process_time() - began_s)


def measure(options: argparse.Namespace, dtype: torch.dtype) -> dict[int, dict[str, float]]:
    """Median milliseconds by number of rows and way."""
    router = RouterSpec(options.experts, options.top_k, "softmax", renormalize=True)
    spec = SparseMlpSpec(router, ExpertSpec(options.inner, "silu"))
    ways = {
        way: Experts(BenchmarkWeights(way, dtype), "e", spec, options.width, TensorParallel()) for way in options.ways
    }
    found: dict[int, dict[str, float]] = {}
    for num_rows in options.rows:
        generator = torch.Generator().manual_seed(num_rows)
        x = torch.randn(num_rows, options.width, generator=generator).to(dtype)
        scores, chosen = torch.rand(num_rows, options.experts, generator=generator).topk(options.top_k)
        times = [
            {way: cpu_ms(lambda: experts(x, chosen, scores)) for way, experts in ways.items()}  # noqa: B023
            for _ in range(options.repeat + 1)
        ][1:]
        found[num_rows] = {way: round(statistics.median(each[way] for each in times), 2) for way in ways}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    for name, default in (("experts", 60), ("top-k", 4), ("width", 2048), ("inner", 1408)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 25, 512])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    results: dict[str, dict[int, dict[str, float]]] = {}
    print(f"{'dtype':<10}{'rows':>6}" + "".join(f"{way + ' ms':>14}" for way in options.ways))
    with torch.inference_mode():
        for dtype in options.dtype:
            results[dtype] = measure(options, getattr(torch, dtype))
            for num_rows, times in results[dtype].items():
                print(f"{dtype:<10}{num_rows:>6}" + "".join(f"{times[way]:>14.2f}" for way in options.ways))
    print(json.dumps({"benchmark": "moe", **vars(options), "ms": results}))


if __name__ == "__main__":
    main()
