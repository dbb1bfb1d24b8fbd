"""A split embedding. Shape letters: T tokens, V ids of the part, D width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def embed_part(token_ids_T: Tensor, weight_VD: Tensor, first: int) -> Tensor:
    """Row id - `first` of the weight for each id (int64) of the part, which begins with `first`; zeros for others."""
    local_T = token_ids_T - first
    mine_T = (local_T >= 0) & (local_T < len(weight_VD))
    rows_TD = F.embedding(torch.where(mine_T, local_T, 0), weight_VD)
    return rows_TD.mul_(mine_T.unsqueeze(1))
