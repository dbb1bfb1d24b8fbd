"""Mixtures of experts: the choice of experts, and the sum of those chosen. `reference` says what each function
computes."""

from __future__ import annotations

from torch import Tensor

from rayllm_kernels.device import uses_triton
from rayllm_kernels.moe import reference
from rayllm_kernels.moe.weights import ExpertWeights

__all__ = ["ExpertWeights", "choose_experts", "mix_experts"]


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
    """(experts_TK int64, on a GPU int32; scores_TK float32), by logits."""
    if uses_triton(logits_TE):
        from rayllm_kernels.moe import triton

        choose = triton.choose_experts
    else:
        choose = reference.choose_experts
    return choose(
        logits_TE,
        choice_bias_E,
        top_k,
        scoring,
        renormalize=renormalize,
        scale=scale,
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=group_score,
    )


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
    """The sum by scores of the experts that each token takes of those held, plus what is given."""
    if uses_triton(x_TD):
        from rayllm_kernels.moe import triton

        mix = triton.mix_experts
    else:
        mix = reference.mix_experts
    return mix(
        x_TD,
        experts_TK,
        scores_TK,
        weights,
        shared_TD=shared_TD,
        shared_gate_T1=shared_gate_T1,
        residual_TD=residual_TD,
    )
