"""A weight in the model's dtype, multiplied by torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rayllm.linear.base import Linear


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
