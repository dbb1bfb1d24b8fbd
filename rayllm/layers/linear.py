"""Linear layers split over ranks. Shape letters: T tokens, I inputs, O outputs."""

from __future__ import annotations

from torch import Tensor

from rayllm.distributed.groups import TensorParallel
from rayllm.linear import Linear
from rayllm.weights.source import Outputs, WeightSource


def column_parallel(
    weights: WeightSource, module: str, num_inputs: int, num_outputs: int, tp: TensorParallel, *, bias: bool
) -> Linear:
    """Each rank computes its share of the outputs."""
    part = tp.shard(num_outputs, f"outputs of {module}")
    return weights.linear([Outputs(module, num_outputs, part)], num_inputs, bias=bias)


class RowParallelLinear:
    """Each rank holds its share of the inputs; the ranks' products are summed."""

    def __init__(
        self, weights: WeightSource, module: str, num_inputs: int, num_outputs: int, tp: TensorParallel, *, bias: bool
    ):
        inputs = tp.shard(num_inputs, f"inputs of {module}")
        first = tp.rank == 0  # bias and residual enter the sum once
        self._linear = weights.linear(
            [Outputs(module, num_outputs)], num_inputs, inputs=inputs, bias=bias, holds_bias=first
        )
        self._adds_residual = first
        self._tp = tp

    def __call__(self, x_TI: Tensor) -> Tensor:
        """The whole product plus bias, on every rank."""
        return self._tp.all_reduce(self.partial(x_TI))

    def partial(self, x_TI: Tensor) -> Tensor:
        """What this rank adds to the sum."""
        return self._linear(x_TI)

    def plus(self, x_TI: Tensor, residual_TO: Tensor) -> Tensor:
        """The whole product plus bias plus residual, on every rank; the residual's values are lost."""
        partial = self._linear.plus(x_TI, residual_TO) if self._adds_residual else self._linear(x_TI)
        return self._tp.all_reduce(partial)
