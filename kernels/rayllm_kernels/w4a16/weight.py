"""The one layout of four-bit weights that the kernel reads, whatever the checkpoint's. Shape letters: I inputs, O
outputs, G groups of inputs, W words, C chunks of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32
"""Neighbouring inputs that are multiplied at once: no group is smaller."""
TILE = 8 * CHUNK
"""Inputs of 32 neighbouring words: word c holds inputs c, 32 + c, 64 + c, ..., so that one shift and one mask give two
chunks."""
_SHIFTS_C = (0, 16, 4, 20, 8, 24, 12, 28)
"""Of a word, for each chunk: even chunks are in its lower half and odd ones in its upper half."""
MIN_BLOCK_OUTPUTS = 32


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """weight[o, i] = (q - zero[group of i, o]) * scale[group of i, o], with q of four bits."""

    words_OW: Tensor
    """int32, inputs filled up to whole tiles with zeros."""
    scales_GO: Tensor
    zeros_GO: Tensor
    """uint8."""
    group_size: int
    num_inputs: int
    order_I: Tensor | None
    """The inputs in the order of their groups; None: as they are (GPTQ without act-order, AWQ)."""
    arrivals: Tensor
    """int32 zeros, one for each block of outputs: programs count there, and leave zeros."""

    @property
    def num_outputs(self) -> int:
        return self.words_OW.shape[0]


def packed(
    q_OI: Tensor, scales_GO: Tensor, zeros_GO: Tensor, group_size: int, order_I: Tensor | None = None
) -> Int4Weight:
    """The layout of values 0 to 15, whose inputs are in the order of their groups. ValueError where the groups do not
    fit the inputs."""
    num_outputs, num_inputs = q_OI.shape
    if group_size == -1:
        group_size = num_inputs
    if group_size % CHUNK and group_size != num_inputs:
        raise ValueError(f"group_size={group_size} is not supported: use a multiple of {CHUNK}, or -1 for all inputs")
    num_groups = -(-num_inputs // group_size)
    for name, given in (("scales", scales_GO), ("zeros", zeros_GO)):
        if given.shape != (num_groups, num_outputs):
            expected = (num_groups, num_outputs)
            raise ValueError(
                f"{name} of shape {tuple(given.shape)} do not fit {num_inputs} inputs: {expected} expected"
            )
    q_OTCW = F.pad(q_OI.to(torch.int32), (0, -num_inputs % TILE)).view(num_outputs, -1, 8, CHUNK)
    words_OTW = torch.zeros_like(q_OTCW[:, :, 0])
    for chunk, shift in enumerate(_SHIFTS_C):
        words_OTW |= q_OTCW[:, :, chunk] << shift
    num_blocks = -(-num_outputs // MIN_BLOCK_OUTPUTS)
    return Int4Weight(
        words_OTW.view(num_outputs, -1),
        scales_GO.contiguous(),
        zeros_GO.to(torch.uint8).contiguous(),
        group_size,
        num_inputs,
        order_I,
        torch.zeros(num_blocks, dtype=torch.int32, device=q_OI.device),
    )


def unpacked(weight: Int4Weight) -> Tensor:
    """q, `[O, I]` int32, inputs in the order of their groups."""
    words_OTW = weight.words_OW.view(weight.num_outputs, -1, CHUNK)
    chunks = [(words_OTW >> shift) & 15 for shift in _SHIFTS_C]
    return torch.stack(chunks, dim=2).view(weight.num_outputs, -1)[:, : weight.num_inputs]


def nibbles(words: Tensor) -> Tensor:
    """The eight values of each int32 word, lowest first, as a new last dimension."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return (words.unsqueeze(-1) >> shifts) & 15
