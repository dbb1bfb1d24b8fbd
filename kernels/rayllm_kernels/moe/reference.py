"""Mixtures of experts in plain torch.

Shape letters: T tokens, E experts, K experts a token takes, G groups of experts, N tokens of one expert, D hidden
width, I inner width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rayllm_kernels.activation.reference import ACTIVATIONS, clamped_swiglu
from rayllm_kernels.moe.weights import ExpertWeights


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


def mix_experts(
    x_TD: Tensor,
    experts_TK: Tensor,
    scores_TK: Tensor,
    weights: ExpertWeights,
    *,
    shared_TD: Tensor | None = None,
    shared_gate_T1: Tensor | None = None,
    residual_TD: Tensor | None = None,
) -> Tensor:
    """`[T, D]`: the sum over the experts that each token takes of those held, each times its score, in the order of
    the choices; plus shared * sigmoid(shared_gate), where there is no gate shared alone; plus residual."""
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for choice in range(experts_TK.shape[1]):
        for place, expert in enumerate(weights.held):
            tokens_N = (experts_TK[:, choice] == expert).nonzero()[:, 0]
            scores_N1 = scores_TK[tokens_N, choice, None]
            x_ND = x_TD[tokens_N]
            if weights.scores_weigh_inputs:
                x_ND = (x_ND * scores_N1).to(x_TD.dtype)
            y_ND = _expert(x_ND, weights, place)
            out_TD[tokens_N] += y_ND if weights.scores_weigh_inputs else y_ND * scores_N1
    if shared_TD is not None:
        out_TD += shared_TD if shared_gate_T1 is None else shared_TD * shared_gate_T1.sigmoid()
    if residual_TD is not None:
        out_TD += residual_TD
    return out_TD.to(x_TD.dtype)


def _expert(x_ND: Tensor, weights: ExpertWeights, place: int) -> Tensor:
    bias_E2I, bias_ED = weights.gate_up_bias_E2I, weights.down_bias_ED
    gate_up_N2I = F.linear(x_ND, weights.gate_up_E2ID[place], None if bias_E2I is None else bias_E2I[place])
    if weights.activation == "clamped_swiglu":
        inner_NI = clamped_swiglu(gate_up_N2I, weights.alpha, weights.limit)
    else:
        gate_NI, up_NI = gate_up_N2I.chunk(2, dim=-1)
        inner_NI = ACTIVATIONS[weights.activation](gate_NI) * up_NI
    return F.linear(inner_NI, weights.down_EDI[place], None if bias_ED is None else bias_ED[place])
