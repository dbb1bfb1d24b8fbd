"""Mixtures of experts in plain torch.

Shape letters: T tokens, E experts, K experts a token takes, G groups of experts, N rows sorted by expert, I inputs,
O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def choose_experts(
    logits_TE: Tensor,
    choice_bias_E: Tensor | None,
    top_k: int,
    scoring: str,
    *,
    renormalize: bool,
    scale: float = 1.0,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
) -> tuple[Tensor, Tensor]:
    """(experts_TK int64, scores_TK float32). The arguments mean what the fields of `rayllm.spec.RouterSpec` of the same
    names say; `choice_bias_E` is float32."""
    logits_TE = logits_TE.float()
    scores_TE = logits_TE.softmax(-1) if scoring == "softmax" else logits_TE.sigmoid()
    choice_TE = scores_TE if choice_bias_E is None else scores_TE + choice_bias_E
    if num_groups > 1:
        choice_TE = _of_best_groups(choice_TE, num_groups, top_groups, 1 if group_score == "max" else 2)
    experts_TK = choice_TE.topk(top_k, dim=-1).indices
    scores_TK = scores_TE.gather(1, experts_TK)
    if renormalize:
        scores_TK = scores_TK / (scores_TK.sum(-1, keepdim=True) + 1e-20)  # sigmoids may all be zero
    return experts_TK, scores_TK if scale == 1.0 else scores_TK * scale


def _of_best_groups(choice_TE: Tensor, num_groups: int, top_groups: int, num_summed: int) -> Tensor:
    """The scores of the best groups' experts, -inf for others. A group's score is the sum of its `num_summed` best."""
    choice_TGE = choice_TE.unflatten(1, (num_groups, -1))
    best_TG = choice_TGE.topk(num_summed, dim=-1).values.sum(-1)
    out_TG = torch.ones_like(best_TG, dtype=torch.bool)
    out_TG.scatter_(1, best_TG.topk(top_groups, dim=-1).indices, False)
    return choice_TGE.masked_fill(out_TG.unsqueeze(-1), float("-inf")).flatten(1)


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, counts: Sequence[int]) -> Tensor:
    """x @ weight[e].T + bias[e] for rows sorted by expert, of which expert e has `counts[e]`; `[N, O]`."""
    out_NO = x_NI.new_empty(x_NI.shape[0], weight_EOI.shape[1])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            out_NO[rows] = F.linear(x_NI[rows], weight_EOI[expert], None if bias_EO is None else bias_EO[expert])
            start += count
    return out_NO
