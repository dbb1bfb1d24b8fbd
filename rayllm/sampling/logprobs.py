"""Log-probabilities of sampled and of prompt tokens: log_softmax of the model's raw logits, before any edit.

Shapes: N positions, V vocabulary ids, K most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rayllm.messages import TokenLogprobs
from rayllm.transfer.download import Download, Downloaded
from rayllm_kernels.sampling.reference import candidates, row_slices


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities on their way to the host."""

    ids_NK: Downloaded
    values_NK: Downloaded
    rank_N: Downloaded
    num_top_N: list[int]

    def to_messages(self) -> list[TokenLogprobs | None]:
        """Waits for the device. None for a line of NaN: one NaN logit makes all of its line NaN."""
        ids_NK = self.ids_NK.array.astype(np.int32)
        values_NK = self.values_NK.array
        is_bad_N = np.isnan(values_NK).any(axis=1).tolist()
        ranks = self.rank_N.array.tolist()
        return [
            None if is_bad else TokenLogprobs(ids_K[: num_top + 1].tobytes(), values_K[: num_top + 1].tobytes(), rank)
            for ids_K, values_K, is_bad, rank, num_top in zip(ids_NK, values_NK, is_bad_N, ranks, self.num_top_N)
        ]


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Log-probabilities still on the device: each line's own token first, then K others: the most likely, or those that
    the line lists."""

    ids_NK: Tensor
    values_NK: Tensor
    rank_N: Tensor
    num_top_N: list[int]
    """How many of the K each line asked for."""

    def to_host(self, download: Download) -> Logprobs:
        """They come with the download."""
        ids_NK, values_NK = download.add(self.ids_NK), download.add(self.values_NK)
        return Logprobs(ids_NK, values_NK, download.add(self.rank_N), self.num_top_N)


def padded_lists(num_top_N: list[int], listed_N: Sequence[tuple[int, ...] | None]) -> np.ndarray | None:
    """`listed_NK` of `compute_logprobs`; None where no line lists ids."""
    if not any(listed is not None for listed in listed_N):
        return None
    num_top = max(num_top_N)
    return np.array([[*(listed or ()), *[-1] * (num_top - len(listed or ()))] for listed in listed_N], np.int64)


def compute_logprobs(
    logits_NV: Tensor,
    token_ids_N: Tensor,
    num_top_N: list[int],
    listed_NK: Tensor | None = None,
) -> LogprobTensors:
    """Does not wait for the device. A rank is 1 plus the number of strictly more likely tokens.

    The `num_top_N[i]` most likely of line i come in falling order, equal ones in order of their ids; or those that
    `listed_NK` (int64, K the largest `num_top_N`; -1 for none) has on the line, in its order.
    """
    num_top = max(num_top_N)
    parts = [
        _logprobs_of_slice(logits_NV[some], token_ids_N[some], num_top, None if listed_NK is None else listed_NK[some])
        for some in row_slices(logits_NV)
    ]
    ids, values, ranks = zip(*parts)
    return LogprobTensors(torch.cat(ids), torch.cat(values), torch.cat(ranks), num_top_N)


def _logprobs_of_slice(
    logits_NV: Tensor, token_ids_N: Tensor, num_top: int, listed_NK: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`listed_NK`: ids in place of the most likely; -1 for none."""
    chosen_N1 = logits_NV.gather(1, token_ids_N[:, None].long())
    max_N1 = logits_NV.amax(1, keepdim=True)
    # Summed in float64, so that the order of summation, which depends on the batch, does not show in float32.
    mass_N1 = (logits_NV - max_N1).exp_().sum(1, keepdim=True, dtype=torch.float64)
    rank_N = (logits_NV > chosen_N1).sum(1) + 1
    ids_NK, values_NK = token_ids_N[:, None].long(), chosen_N1
    if num_top:
        top_NK, top_ids_NK, _ = candidates(logits_NV, num_top)
        top_NK, top_ids_NK = top_NK[:, :num_top], top_ids_NK[:, :num_top]
        if listed_NK is not None:
            listed_NK = listed_NK[:, : top_NK.shape[1]]
            top_ids_NK = torch.where(listed_NK < 0, top_ids_NK, listed_NK)
            top_NK = logits_NV.gather(1, top_ids_NK)
        values_NK = torch.cat((values_NK, top_NK), 1)
        ids_NK = torch.cat((ids_NK, top_ids_NK), 1)
    return ids_NK, ((values_NK - max_N1).double() - mass_N1.log()).float(), rank_N
