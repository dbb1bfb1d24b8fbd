"""`reference` in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.launch import launch

_BLOCK = 2048


def embed_part(token_ids_T: Tensor, weight_VD: Tensor, first: int) -> Tensor:
    """See `reference.embed_part`; the weight is contiguous."""
    num_tokens, (num_ids, width) = len(token_ids_T), weight_VD.shape
    rows_TD = torch.empty((num_tokens, width), dtype=weight_VD.dtype, device=weight_VD.device)
    grid = (num_tokens, triton.cdiv(width, _BLOCK))
    launch(_embed_part, grid, token_ids_T, weight_VD, rows_TD, first, num_ids, width, BLOCK=_BLOCK, num_warps=4)
    return rows_TD


@triton.jit
def _embed_part(token_ids_ptr, weight_ptr, rows_ptr, first, num_ids, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    local = tl.load(token_ids_ptr + token) - first
    num_columns = tl.where((local >= 0) & (local < num_ids), width, 0)
    row = tl.load(weight_ptr + local * width + column, mask=column < num_columns, other=0.0)
    tl.store(rows_ptr + token * width + column, row, mask=column < width)
