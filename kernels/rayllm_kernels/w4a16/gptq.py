"""Weights of GPTQ checkpoints (Frantar et al., 2022; the tensors' layout is AutoGPTQ's). Shape letters: I inputs, O
outputs, G groups of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayllm_kernels.w4a16.weight import Int4Weight, nibbles, packed


def from_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, *, group_size: int, zeros_are_less_one: bool
) -> Int4Weight:
    """`qweight` int32 `[I / 8, O]`, `qzeros` int32 `[G, O / 8]`, `scales` `[G, O]`, `g_idx` `[I]` the group of each
    input; `group_size` -1: one group. `zeros_are_less_one`: checkpoint_format "gptq", not "gptq_v2". ValueError for
    what does not fit together."""
    _check_int32(qweight=qweight, qzeros=qzeros)
    q_OI = nibbles(qweight.T).flatten(1)
    zeros_GO = nibbles(qzeros).flatten(1)
    if zeros_are_less_one:
        zeros_GO = (zeros_GO + 1) & 15
    num_inputs = q_OI.shape[1]
    size = num_inputs if group_size == -1 else group_size
    order_I = None if g_idx is None else _order(g_idx, num_inputs, size)
    if order_I is not None:
        q_OI = q_OI[:, order_I]
    return packed(q_OI, scales, zeros_GO, group_size, order_I)


def _order(g_idx: Tensor, num_inputs: int, group_size: int) -> Tensor | None:
    """The inputs by group; None where they are already in order."""
    if g_idx.shape != (num_inputs,):
        raise ValueError(f"g_idx has shape {tuple(g_idx.shape)}, and the weight {num_inputs} inputs")
    groups_I = torch.arange(num_inputs, dtype=g_idx.dtype, device=g_idx.device) // group_size
    if torch.equal(g_idx, groups_I):
        return None
    order_I = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order_I], groups_I):
        sizes = g_idx.bincount().tolist()
        raise ValueError(f"g_idx has groups of {sizes} inputs: each but the last must have group_size={group_size}")
    return order_I


def _check_int32(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} is {tensor.dtype}: int32 words of eight four-bit values are expected")
