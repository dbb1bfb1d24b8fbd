"""Matrix products: one weight on one rank, and the column- and row-parallel forms made of it.

On CPU the weight is laid out once for oneDNN, which then also applies an activation, a product or a residual sum in
the same pass. That layout replaces the plain weight. Shape letters: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rayllm.distributed.groups import TensorParallel
from rayllm.weights.source import WeightSource
from rayllm_kernels.activation import ACTIVATIONS

_FUSED_ACTIVATIONS = {"silu": "swish", "relu": "relu"}
_PACKED_DTYPES = (torch.bfloat16, torch.float32)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN's packed products are there for this weight (private names of torch, so they are looked for)."""
    ops = torch.ops.mkldnn
    return (
        weight.device.type == "cpu"
        and weight.dtype in _PACKED_DTYPES
        and weight.numel() > 0
        and torch.backends.mkldnn.is_available()
        and hasattr(ops, "_reorder_linear_weight")
        and hasattr(ops, "_linear_pointwise")
        and (weight.dtype != torch.bfloat16 or bool(ops._is_mkldnn_bf16_supported()))
    )


class Linear:
    """x @ weight.T + bias, with an optional activation, and a tensor multiplied with or added to the result.

    `weight_OI` is not kept where it is packed, unless somebody else holds it.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None):
        self.num_outputs, self.num_inputs = weight_OI.shape
        self._bias = bias_O
        self._packed = can_pack(weight_OI)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI) if self._packed else weight_OI

    def __call__(self, x_TI: Tensor) -> Tensor:
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x_TI, self._weight, self._bias, "none", [], "")
        return F.linear(x_TI, self._weight, self._bias)

    def activated(self, x_TI: Tensor, activation: str) -> Tensor:
        """activation(x @ weight.T + bias)."""
        if self._packed and activation in _FUSED_ACTIVATIONS:
            fused = _FUSED_ACTIVATIONS[activation]
            return torch.ops.mkldnn._linear_pointwise(x_TI, self._weight, self._bias, fused, [], "")
        return ACTIVATIONS[activation](self(x_TI))

    def times(self, x_TI: Tensor, factor_TO: Tensor) -> Tensor:
        """(x @ weight.T + bias) * factor."""
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x_TI, factor_TO, self._weight, self._bias, "mul")
        return F.linear(x_TI, self._weight, self._bias).mul_(factor_TO)

    def plus(self, x_TI: Tensor, residual_TO: Tensor) -> Tensor:
        """x @ weight.T + bias + residual."""
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x_TI, residual_TO, self._weight, self._bias, "add")
        return F.linear(x_TI, self._weight, self._bias).add_(residual_TO)


def column_parallel(
    weights: WeightSource, name: str, num_inputs: int, num_outputs: int, tp: TensorParallel, *, bias: bool
) -> Linear:
    """Each rank computes its share of the outputs."""
    part = tp.shard(num_outputs, f"outputs of {name}")
    weight = weights.tensor(f"{name}.weight", (num_outputs, num_inputs), part=part)
    return Linear(weight, weights.tensor(f"{name}.bias", (num_outputs,), part=part) if bias else None)


class RowParallelLinear:
    """Each rank holds its share of the inputs; the ranks' products are summed."""

    def __init__(
        self,
        weights: WeightSource,
        name: str,
        num_inputs: int,
        num_outputs: int,
        tp: TensorParallel,
        *,
        bias: bool,
        part: range | None = None,
    ):
        part = part if part is not None else tp.shard(num_inputs, f"inputs of {name}")
        weight = weights.tensor(f"{name}.weight", (num_outputs, num_inputs), dim=1, part=part)
        first = tp.rank == 0  # bias and residual enter the sum once
        self._linear = Linear(weight, weights.tensor(f"{name}.bias", (num_outputs,)) if bias and first else None)
        self._adds_residual = first
        self._tp = tp

    def plus(self, x_TI: Tensor, residual_TO: Tensor) -> Tensor:
        """The whole product plus bias plus residual, on every rank."""
        partial = self._linear.plus(x_TI, residual_TO) if self._adds_residual else self._linear(x_TI)
        return self._tp.all_reduce(partial)
