"""Products with a weight of its own for each head. Shape letters: H heads, T tokens, I inputs, O outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from rayllm.linear.widened import MIN_WIDENED_ROWS, WidenedLinear


class PerHeadLinear:
    """x[h] @ weight[h].T. The weight is kept as it is: `weight_HOI` may be a view of what somebody else holds."""

    def __init__(self, weight_HOI: Tensor):
        self._weight_HIO = weight_HOI.transpose(1, 2)
        self._widens = WidenedLinear.supports(weight_HOI)

    def __call__(self, x_THI: Tensor) -> Tensor:
        """Each head's product with its own inputs, `[T, H, O]`, heads side by side in steps (not contiguous)."""
        x_HTI, weight_HIO = x_THI.transpose(0, 1), self._weight_HIO
        if self._widens and x_HTI.shape[1] >= MIN_WIDENED_ROWS:
            return torch.bmm(x_HTI.float(), weight_HIO.float()).to(x_THI.dtype).transpose(0, 1)
        return torch.bmm(x_HTI, weight_HIO).transpose(0, 1)

    def into(self, x_THI: Tensor, out_THO: Tensor) -> None:
        """Writes the products to `out_THO`, which may be part of a wider tensor; the weight is not widened."""
        torch.bmm(x_THI.transpose(0, 1), self._weight_HIO, out=out_THO.transpose(0, 1))

    def of_shared(self, x_TI: Tensor, heads: range, out_HTO: Tensor) -> None:
        """Writes the products of some heads with the same inputs to `out_HTO`, which may be part of a wider tensor."""
        weight_HIO = self._weight_HIO[heads.start : heads.stop]
        if self._widens and x_TI.shape[0] >= MIN_WIDENED_ROWS:
            out_HTO.copy_(torch.bmm(x_TI.float().expand(len(weight_HIO), -1, -1), weight_HIO.float()))
        else:
            torch.bmm(x_TI.expand(len(weight_HIO), -1, -1), weight_HIO, out=out_HTO)
