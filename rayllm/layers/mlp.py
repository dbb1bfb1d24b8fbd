"""Feed-forward layers, split over their inner width. Shape letters: T tokens, D hidden width, I inner width."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rayllm.distributed.groups import TensorParallel
from rayllm.layers.linear import RowParallelLinear, column_parallel
from rayllm.spec import MlpSpec
from rayllm.weights.source import Outputs, WeightSource


class PlainProjection:
    """activation(up(x))."""

    def __init__(self, weights: WeightSource, prefix: str, spec: MlpSpec, width: int, tp: TensorParallel):
        self._up = column_parallel(weights, f"{prefix}.up", width, spec.intermediate_size, tp, bias=spec.bias)
        self._activation = spec.activation

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self._up.activated(x_TD, self._activation)


class Mlp:
    """down(projection(x))."""

    def __init__(self, weights: WeightSource, prefix: str, spec: MlpSpec, width: int, tp: TensorParallel):
        self._projection: Callable[[Tensor], Tensor]
        if spec.gated:
            part = tp.shard(spec.intermediate_size, "intermediate_size")
            gate, up = (Outputs(f"{prefix}.{name}", spec.intermediate_size, part) for name in ("gate", "up"))
            self._projection = weights.gated_linear(gate, up, width, spec.activation, bias=spec.bias)
        else:
            self._projection = PlainProjection(weights, prefix, spec, width, tp)
        self._down = RowParallelLinear(weights, f"{prefix}.down", spec.intermediate_size, width, tp, bias=spec.bias)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self._down(self._projection(x_TD))

    def partial(self, x_TD: Tensor) -> Tensor:
        """What this rank adds to the sum over ranks."""
        return self._down.partial(self._projection(x_TD))

    def plus(self, x_TD: Tensor, residual_TD: Tensor) -> Tensor:
        """down(projection(x)) + residual, whose values are lost."""
        return self._down.plus(self._projection(x_TD), residual_TD)
