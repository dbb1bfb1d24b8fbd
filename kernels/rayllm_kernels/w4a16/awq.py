"""Weights of AWQ checkpoints (Lin et al., 2023; version "gemm" of AutoAWQ). Shape letters: I inputs, O outputs, G
groups of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayllm_kernels.w4a16.weight import Int4Weight, nibbles, packed

_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Of eight neighbouring outputs, that of each nibble of a word, lowest first."""


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, group_size: int) -> Int4Weight:
    """`qweight` int32 `[I, O / 8]`, `qzeros` int32 `[G, O / 8]`, `scales` `[G, O]`; `group_size` -1: one group.
    ValueError for what does not fit together."""
    for name, tensor in (("qweight", qweight), ("qzeros", qzeros)):
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} is {tensor.dtype}: int32 words of eight four-bit values are expected")
    return packed(_outputs(qweight).T, scales, _outputs(qzeros), group_size)


def _outputs(words: Tensor) -> Tensor:
    """`[N, O / 8]` words as `[N, O]` values."""
    values = nibbles(words)
    in_order = torch.empty_like(values)
    in_order[..., list(_COLUMNS)] = values
    return in_order.flatten(1)
