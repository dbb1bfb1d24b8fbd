"""A weight reordered for oneDNN's products on CPU, which apply activation, product or sum to the result themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from rayllm.linear.base import Linear
from rayllm.torch_private import (
    has_native_products,
    has_packed_products,
    packed_product,
    packed_product_with,
    packed_weight,
)

_FUSED_ACTIVATIONS = {"silu": "swish", "relu": "relu"}
_DTYPES = (torch.bfloat16, torch.float32)


class PackedLinear(Linear):
    """`weight_OI` is not kept, unless somebody else holds it."""

    fuses_elementwise = True

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None):
        super().__init__(weight_OI.shape[1], weight_OI.shape[0])
        self._weight = packed_weight(weight_OI)
        self._bias = bias_O

    @classmethod
    def supports(cls, weight_OI: Tensor) -> bool:
        """Whether this torch and this CPU have oneDNN's packed products for the weight."""
        return (
            weight_OI.device.type == "cpu"
            and weight_OI.dtype in _DTYPES
            and weight_OI.numel() > 0
            and has_packed_products()
            and (weight_OI.dtype != torch.bfloat16 or bool(has_native_products(weight_OI.dtype)))
        )

    def __call__(self, x_TI: Tensor) -> Tensor:
        return packed_product(x_TI, self._weight, self._bias)

    def activated(self, x_TI: Tensor, activation: str) -> Tensor:
        if activation not in _FUSED_ACTIVATIONS:
            return super().activated(x_TI, activation)
        return packed_product(x_TI, self._weight, self._bias, _FUSED_ACTIVATIONS[activation])

    def times(self, x_TI: Tensor, factor_TO: Tensor) -> Tensor:
        return packed_product_with(x_TI, factor_TO, self._weight, self._bias, "mul")

    def plus(self, x_TI: Tensor, residual_TO: Tensor) -> Tensor:
        return packed_product_with(x_TI, residual_TO, self._weight, self._bias, "add")
