"""A 16-bit weight on a CPU without instructions for 16-bit floats: multiplied in float32, one piece at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from rayllm.linear.dense import DenseLinear
from rayllm.torch_private import has_native_products

MIN_WIDENED_ROWS = 8
"""With fewer, reading the weight costs more than multiplying: torch's own product is faster."""
_PIECE_SIZE = 2**19
"""Numbers of a weight that are widened at a time: 2 MiB, which stay in a core's cache."""


class WidenedLinear(DenseLinear):
    """Memory holds 16 bits a number; the result is rounded once."""

    @classmethod
    def supports(cls, weight_OI: Tensor) -> bool:
        """Whether torch would multiply this weight's 16-bit floats one by one, for want of instructions."""
        if weight_OI.device.type != "cpu" or weight_OI.dtype not in (torch.bfloat16, torch.float16):
            return False
        return has_native_products(weight_OI.dtype) is False

    def __call__(self, x_TI: Tensor) -> Tensor:
        if x_TI.shape[0] < MIN_WIDENED_ROWS:
            return super().__call__(x_TI)
        return widened_product(x_TI, self._weight, self._bias)


def widened_product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
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
