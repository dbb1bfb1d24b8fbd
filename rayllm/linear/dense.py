"""A weight in the model's dtype, multiplied by torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rayllm.linear.base import Linear
from rayllm_kernels.device import uses_triton


class DenseLinear(Linear):
    """`weight_OI` and `bias_O` as they are."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None):
        super().__init__(weight_OI.shape[1], weight_OI.shape[0])
        self._weight = weight_OI
        self._bias = bias_O

    @classmethod
    def supports(cls, weight_OI: Tensor) -> bool:
        """Whether this class can multiply the weight, and is meant for it."""
        return weight_OI.dtype.is_floating_point

    def __call__(self, x_TI: Tensor) -> Tensor:
        return F.linear(x_TI, self._weight, self._bias)

    def plus(self, x_TI: Tensor, residual_TO: Tensor) -> Tensor:
        """On a GPU the product adds itself to the residual, without a kernel for the sum."""
        if not uses_triton(x_TI):
            return super().plus(x_TI, residual_TO)
        sum_TO = residual_TO.addmm_(x_TI, self._weight.t())
        return sum_TO if self._bias is None else sum_TO.add_(self._bias)
