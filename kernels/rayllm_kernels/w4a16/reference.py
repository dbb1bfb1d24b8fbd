"""Products with four-bit weights in plain torch. Shape letters: T tokens, I inputs, O outputs, G groups of inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rayllm_kernels.w4a16.weight import Int4Weight, unpacked


def int4_linear(x_TI: Tensor, weight: Int4Weight, bias_O: Tensor | None = None) -> Tensor:
    """x @ dequantized(weight).T + bias, computed in float32, `[T, O]` in the dtype of `x_TI`."""
    out_TO = F.linear(x_TI.float(), dequantized(weight), None if bias_O is None else bias_O.float())
    return out_TO.to(x_TI.dtype)


def dequantized(weight: Int4Weight) -> Tensor:
    """`[O, I]` float32, inputs in the order of the model."""
    groups_I = torch.arange(weight.num_inputs, device=weight.words_OW.device) // weight.group_size
    zeros_IO, scales_IO = weight.zeros_GO[groups_I].float(), weight.scales_GO[groups_I].float()
    values_OI = (unpacked(weight) - zeros_IO.T) * scales_IO.T
    if weight.order_I is None:
        return values_OI
    in_order_OI = torch.empty_like(values_OI)
    in_order_OI[:, weight.order_I] = values_OI
    return in_order_OI
