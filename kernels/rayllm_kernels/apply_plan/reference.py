"""A step's differences of the device-resident state. Shape letters: N words, T tokens of the step, R rows."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_plan(
    state: Tensor, indices_N: Tensor, values_N: Tensor, token_ids_T: Tensor, sources_T: Tensor, last_token_R: Tensor
) -> None:
    """state[indices] = values, and token_ids[t] = last_token[sources[t]] for the tokens that only the device knows.

    `state` is a contiguous int32 tensor, which `indices_N` (int32) sees as flat; each index occurs once, and one below
    0 is skipped, as is a token whose source (int32) is below 0. `values_N` is int32, token ids are int64.
    """
    if len(indices_N):
        written_N = indices_N >= 0
        state.view(-1).index_copy_(0, indices_N[written_N].long(), values_N[written_N])
    known_T = sources_T < 0
    sampled_T = last_token_R[sources_T.clamp(min=0)]
    token_ids_T.copy_(torch.where(known_T, token_ids_T, sampled_T))
