"""Weights of eight bits and their scales. Shape letters: I inputs, O outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
"""Inputs, and outputs, that share a scale, where scales are of blocks (DeepSeek-AI, 2024, DeepSeek-V3)."""
MIN_BLOCK_OUTPUTS = 64


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """weight[o, i] = values[o, i] * scale, where a scale belongs to all, to an output or to a block of 128 by 128."""

    values_OI: Tensor
    """float8 e4m3, contiguous."""
    scales: Tensor
    """float32: `[1, 1]`, `[O, 1]` or `[ceil(O / 128), ceil(I / 128)]`."""
    input_scale: Tensor | None
    """float32 `[1]`: a fixed scale of activations. None: each token has its own, and each block of 128 inputs of a
    token where scales are of blocks."""
    arrivals: Tensor
    """int32 zeros, one for each block of outputs: programs count there, and leave zeros."""

    @property
    def has_blocks(self) -> bool:
        return self.scales.shape[1] > 1 or self.scales.shape[0] not in (1, self.values_OI.shape[0])


def fp8_weight(values_OI: Tensor, scales: Tensor, input_scale: Tensor | None = None) -> Fp8Weight:
    """Of a checkpoint's tensors; `scales` multiply, and those of one dimension or none are of outputs or of all.
    ValueError for what does not fit together."""
    if values_OI.dtype != torch.float8_e4m3fn:
        raise ValueError(f"the weight is {values_OI.dtype}: torch.float8_e4m3fn is expected")
    num_outputs, num_inputs = values_OI.shape
    given = scales.reshape(-1, 1) if scales.dim() < 2 else scales
    blocks = (-(-num_outputs // BLOCK), -(-num_inputs // BLOCK))
    if tuple(given.shape) not in ((1, 1), (num_outputs, 1), blocks):
        raise ValueError(
            f"scales of shape {tuple(scales.shape)} do not fit a weight of {num_outputs} outputs and {num_inputs} "
            f"inputs: (1, 1), ({num_outputs}, 1) or {blocks} are expected"
        )
    if input_scale is not None:
        if input_scale.numel() != 1:
            raise ValueError(f"input_scale has {input_scale.numel()} values: one of the whole tensor is expected")
        input_scale = input_scale.reshape(1).float()
    arrivals = torch.zeros(-(-num_outputs // MIN_BLOCK_OUTPUTS), dtype=torch.int32, device=values_OI.device)
    return Fp8Weight(values_OI.contiguous(), given.float().contiguous(), input_scale, arrivals)
