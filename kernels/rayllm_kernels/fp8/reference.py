"""Products with weights and activations of eight bits in plain torch. Shape letters: T tokens, I inputs, O outputs, G
groups of inputs, S inputs of a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rayllm_kernels.fp8.weight import BLOCK, Fp8Weight

LARGEST = 448.0
"""Of float8 e4m3."""
SMALLEST_SCALE = 1e-12
"""Of activations, so that zeros stay zeros."""


def fp8_linear(x_TI: Tensor, weight: Fp8Weight, bias_O: Tensor | None = None) -> Tensor:
    """x @ dequantized(weight).T + bias in float32, where x is rounded to float8 first; `[T, O]` in the dtype of x."""
    group_size = BLOCK if weight.has_blocks else x_TI.shape[1]
    values_TI, scales_TG = quantize(x_TI, group_size, weight.input_scale)
    rounded_TI = values_TI.float() * scales_TG.repeat_interleave(group_size, dim=1)[:, : x_TI.shape[1]]
    out_TO = F.linear(rounded_TI, dequantized(weight), None if bias_O is None else bias_O.float())
    return out_TO.to(x_TI.dtype)


def quantize(x_TI: Tensor, group_size: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(values_TI float8 e4m3, scales_TG float32). Without a `scale`, each group of `group_size` inputs has one that
    makes its largest value 448; the last group may be smaller. With one, what is too large for it becomes 448."""
    num_tokens, num_inputs = x_TI.shape
    x_TGS = F.pad(x_TI.float(), (0, -num_inputs % group_size)).view(num_tokens, -1, group_size)
    if scale is None:
        scales_TG = (x_TGS.abs().amax(-1) / LARGEST).clamp(min=SMALLEST_SCALE)
    else:
        scales_TG = scale.expand(x_TGS.shape[:2]).contiguous()
    values_TGS = (x_TGS / scales_TG.unsqueeze(-1)).clamp(-LARGEST, LARGEST)
    return values_TGS.flatten(1)[:, :num_inputs].to(torch.float8_e4m3fn), scales_TG


def dequantized(weight: Fp8Weight) -> Tensor:
    """`[O, I]` float32."""
    scales = weight.scales
    if weight.has_blocks:
        num_outputs, num_inputs = weight.values_OI.shape
        scales = scales.repeat_interleave(BLOCK, dim=0)[:num_outputs].repeat_interleave(BLOCK, dim=1)[:, :num_inputs]
    return weight.values_OI.float() * scales
