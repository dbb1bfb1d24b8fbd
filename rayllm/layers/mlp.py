"""Feed-forward layers, split over their inner width. Shape letters: T tokens, D hidden width, I inner width."""

from __future__ import annotations

import torch
from torch import Tensor

from rayllm.distributed.groups import TensorParallel
from rayllm.layers.linear import Linear, RowParallelLinear, can_pack, column_parallel
from rayllm.layers.spec import MlpSpec
from rayllm.weights.source import WeightSource
from rayllm_kernels.activation import ACTIVATIONS, silu_mul


class GatedProjection:
    """activation(gate(x)) * up(x).

    One matrix for both and one elementwise kernel; where oneDNN can apply activation and product inside the products
    themselves, two matrices, and the wide intermediate is never written.
    """

    def __init__(self, weights: WeightSource, prefix: str, spec: MlpSpec, width: int, tp: TensorParallel):
        part = tp.shard(spec.intermediate_size, "intermediate_size")
        shape = (spec.intermediate_size, width)
        gate_ID, up_ID = (weights.tensor(f"{prefix}.{name}.weight", shape, part=part) for name in ("gate", "up"))
        gate_bias = up_bias = None
        if spec.bias:
            gate_bias, up_bias = (
                weights.tensor(f"{prefix}.{name}.bias", shape[:1], part=part) for name in ("gate", "up")
            )
        self._activation = spec.activation
        self._separate: tuple[Linear, Linear] | None = None
        if can_pack(gate_ID):
            self._separate = (Linear(gate_ID, gate_bias), Linear(up_ID, up_bias))
        else:
            bias = torch.cat((gate_bias, up_bias)) if gate_bias is not None and up_bias is not None else None
            self._joined = Linear(torch.cat((gate_ID, up_ID)), bias)

    def __call__(self, x_TD: Tensor) -> Tensor:
        if self._separate is not None:
            gate, up = self._separate
            return up.times(x_TD, gate.activated(x_TD, self._activation))
        gate_up_TI2 = self._joined(x_TD)
        if self._activation == "silu":
            return silu_mul(gate_up_TI2)
        gate_TI, up_TI = gate_up_TI2.chunk(2, dim=-1)
        return ACTIVATIONS[self._activation](gate_TI).mul_(up_TI)


class PlainProjection:
    """activation(up(x))."""

    def __init__(self, weights: WeightSource, prefix: str, spec: MlpSpec, width: int, tp: TensorParallel):
        self._up = column_parallel(weights, f"{prefix}.up", width, spec.intermediate_size, tp, bias=spec.bias)
        self._activation = spec.activation

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self._up.activated(x_TD, self._activation)


class Mlp:
    """down(projection(x)) + residual."""

    def __init__(self, weights: WeightSource, prefix: str, spec: MlpSpec, width: int, tp: TensorParallel):
        projection = GatedProjection if spec.gated else PlainProjection
        self._projection = projection(weights, prefix, spec, width, tp)
        self._down = RowParallelLinear(weights, f"{prefix}.down", spec.intermediate_size, width, tp, bias=spec.bias)

    def __call__(self, x_TD: Tensor, residual_TD: Tensor) -> Tensor:
        return self._down.plus(self._projection(x_TD), residual_TD)
