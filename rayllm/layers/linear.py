"""Matrix products: one weight on one rank, and the column- and row-parallel forms made of it.

On CPU the weight is laid out once for oneDNN, which then also applies an activation, a product or a residual sum in
the same pass. That layout replaces the plain weight. A CPU without instructions for 16-bit floats multiplies them in
float32, one piece of the weight at a time. Shape letters: T tokens, I inputs, O outputs.
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
_MIN_WIDENED_ROWS = 8
"""With fewer, reading the weight costs more than multiplying: torch's own product is faster."""
_PIECE_SIZE = 2**19
"""Numbers of a weight that are widened at a time: 2 MiB, which stay in a core's cache."""


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


def is_emulated(weight: Tensor) -> bool:
    """Whether torch multiplies this weight's 16-bit floats one by one, for want of instructions."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    name = "bf16" if weight.dtype == torch.bfloat16 else "fp16"
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return supported is not None and not supported()


def widened_linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`F.linear` of 16-bit floats, computed in float32 and rounded once."""
    num_outputs, num_inputs = weight_OI.shape
    size = max(16, _PIECE_SIZE // num_inputs)
    wide_TI = x_TI.float()
    out_TO = x_TI.new_empty(x_TI.shape[0], num_outputs)
    piece = torch.empty(min(size, num_outputs), num_inputs)
    for start in range(0, num_outputs, size):
        part = weight_OI[start : start + size]
        wide = piece[: part.shape[0]].copy_(part).t()
        if bias_O is None:
            out_TO[:, start : start + size] = wide_TI @ wide
        else:
            out_TO[:, start : start + size] = torch.addmm(bias_O[start : start + size].float(), wide_TI, wide)
    return out_TO


class Linear:
    """x @ weight.T + bias, with an optional activation, and a tensor multiplied with or added to the result.

    `weight_OI` is not kept where it is packed, unless somebody else holds it.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None):
        self.num_outputs, self.num_inputs = weight_OI.shape
        self._bias = bias_O
        self._packed = can_pack(weight_OI)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI) if self._packed else weight_OI
        self._is_emulated = not self._packed and is_emulated(weight_OI)

    def __call__(self, x_TI: Tensor) -> Tensor:
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x_TI, self._weight, self._bias, "none", [], "")
        if self._is_emulated and x_TI.shape[0] >= _MIN_WIDENED_ROWS:
            return widened_linear(x_TI, self._weight, self._bias)
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
        return self(x_TI).mul_(factor_TO)

    def plus(self, x_TI: Tensor, residual_TO: Tensor) -> Tensor:
        """x @ weight.T + bias + residual."""
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x_TI, residual_TO, self._weight, self._bias, "add")
        return self(x_TI).add_(residual_TO)


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
