"""Which class multiplies a plain weight."""

from __future__ import annotations

from torch import Tensor

from rayllm.linear.base import Linear
from rayllm.linear.dense import DenseLinear
from rayllm.linear.packed import PackedLinear
from rayllm.linear.widened import WidenedLinear

_CLASSES: tuple[type[DenseLinear] | type[PackedLinear], ...] = (PackedLinear, WidenedLinear, DenseLinear)
"""The fastest first; the last supports every floating-point weight."""


def dense_linear(weight_OI: Tensor, bias_O: Tensor | None = None) -> Linear:
    """The fastest `Linear` for a weight in the model's dtype, on this machine. `ValueError` for one that is not of
    floating point."""
    for kind in _CLASSES:
        if kind.supports(weight_OI):
            return kind(weight_OI, bias_O)
    raise ValueError(f"a weight of {weight_OI.dtype} cannot be multiplied as it is: it must be dequantized first")
