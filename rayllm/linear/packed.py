"""A weight reordered for oneDNN's products on CPU, which apply activation, product or sum to the result themselves.

The operators are private names of torch, read in torch 2.11 to 2.13; nothing else of RayLLM uses them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayllm.linear.base import Linear

_FUSED_ACTIVATIONS = {"silu": "swish", "relu": "relu"}
_DTYPES = (torch.bfloat16, torch.float32)


class PackedLinear(Linear):
    """`weight_OI` is not kept, unless somebody else holds it."""

    fuses_elementwise = True

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None):
        super().__init__(weight_OI.shape[1], weight_OI.shape[0])
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
        self._bias = bias_O

    @classmethod
    def supports(cls, weight_OI: Tensor) -> bool:
        """Whether this torch and this CPU have oneDNN's packed products for the weight."""
        ops = torch.ops.mkldnn
        return (
            weight_OI.device.type == "cpu"
            and weight_OI.dtype in _DTYPES
            and weight_OI.numel() > 0
            and torch.backends.mkldnn.is_available()
            and hasattr(ops, "_reorder_linear_weight")
            and hasattr(ops, "_linear_pointwise")
            and (weight_OI.dtype != torch.bfloat16 or bool(ops._is_mkldnn_bf16_supported()))
        )

    def __call__(self, x_TI: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x_TI, self._weight, self._bias, "none", [], "")

    def activated(self, x_TI: Tensor, activation: str) -> Tensor:
        if activation not in _FUSED_ACTIVATIONS:
            return super().activated(x_TI, activation)
        fused = _FUSED_ACTIVATIONS[activation]
        return torch.ops.mkldnn._linear_pointwise(x_TI, self._weight, self._bias, fused, [], "")

    def times(self, x_TI: Tensor, factor_TO: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x_TI, factor_TO, self._weight, self._bias, "mul")

    def plus(self, x_TI: Tensor, residual_TO: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x_TI, residual_TO, self._weight, self._bias, "add")
