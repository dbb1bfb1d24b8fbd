"""The choice of experts in one launch. Shape letters: T tokens, E experts, K experts a token takes, G groups, M experts
of a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.launch import launch


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
    """See `reference.choose_experts`; the experts are int32. Of equals the first is taken. A token with NaN among its
    logits has NaN among its scores, and experts that exist."""
    assert logits_TE.stride(1) == 1, "experts must be neighbours"
    num_tokens, num_experts = logits_TE.shape
    experts_TK = torch.empty((num_tokens, top_k), dtype=torch.int32, device=logits_TE.device)
    scores_TK = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits_TE.device)
    launch(
        route_kernel,
        (num_tokens,),
        logits_TE,
        choice_bias_E,
        experts_TK,
        scores_TK,
        logits_TE.stride(0),
        scale,
        TOP_K=top_k,
        SIGMOID=scoring == "sigmoid",
        RENORMALIZE=renormalize,
        BIAS=choice_bias_E is not None,
        NUM_GROUPS=num_groups,
        GROUP_SIZE=num_experts // num_groups,
        TOP_GROUPS=top_groups,
        TWO_BEST=group_score == "top2_sum",
        BLOCK_G=triton.next_power_of_2(num_groups),
        BLOCK_M=triton.next_power_of_2(num_experts // num_groups),
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=1,
    )
    return experts_TK, scores_TK


@triton.jit
def route_kernel(
    logits_ptr, bias_ptr, experts_ptr, scores_ptr, stride, scale,
    TOP_K: tl.constexpr, SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, BIAS: tl.constexpr,
    NUM_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr, TWO_BEST: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program a token."""
    token = tl.program_id(0).to(tl.int64)
    groups_G, members_M, choices_K = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    experts = groups_G[:, None] * GROUP_SIZE + members_M[None, :]
    kept = (groups_G < NUM_GROUPS)[:, None] & (members_M < GROUP_SIZE)[None, :]
    logits = tl.load(logits_ptr + token * stride + experts, mask=kept, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        masses = tl.exp(logits - tl.max(tl.max(logits, 1), 0))
        scores = masses / tl.sum(tl.sum(masses, 1), 0)
    choice = scores
    if BIAS:
        choice += tl.load(bias_ptr + experts, mask=kept, other=0.0)
    choice = tl.where(choice == choice, choice, float("inf"))  # NaN is not ordered, and must not be hidden
    choice = tl.where(kept, choice, float("-inf"))
    if NUM_GROUPS > 1:
        choice = _of_best_groups(choice, groups_G, members_M, TOP_GROUPS, TWO_BEST)
    choice_E, scores_E = tl.reshape(choice, [BLOCK_G * BLOCK_M]), tl.reshape(scores, [BLOCK_G * BLOCK_M])
    places_E = tl.arange(0, BLOCK_G * BLOCK_M)
    experts_K, scores_K = tl.zeros([BLOCK_K], tl.int32), tl.zeros([BLOCK_K], tl.float32)
    for k in tl.static_range(TOP_K):
        place = tl.argmax(choice_E, 0)
        score = tl.sum(tl.where(places_E == place, scores_E, 0.0), 0)
        choice_E = tl.where(places_E == place, float("-inf"), choice_E)
        experts_K = tl.where(choices_K == k, place // BLOCK_M * GROUP_SIZE + place % BLOCK_M, experts_K)
        scores_K = tl.where(choices_K == k, score, scores_K)
    if RENORMALIZE:
        scores_K /= tl.sum(scores_K, 0) + 1e-20
    at = token * TOP_K + choices_K
    tl.store(experts_ptr + at, experts_K, mask=choices_K < TOP_K)
    tl.store(scores_ptr + at, scores_K * scale, mask=choices_K < TOP_K)


@triton.jit
def _of_best_groups(choice, groups_G, members_M, TOP_GROUPS: tl.constexpr, TWO_BEST: tl.constexpr):
    """-inf for the experts of the other groups."""
    best_G = tl.max(choice, 1)
    if TWO_BEST:
        is_best = members_M[None, :] == tl.argmax(choice, 1)[:, None]
        best_G += tl.max(tl.where(is_best, float("-inf"), choice), 1)
    taken_G = groups_G < 0
    for _ in tl.static_range(TOP_GROUPS):
        group = tl.argmax(best_G, 0)
        taken_G = taken_G | (groups_G == group)
        best_G = tl.where(groups_G == group, float("-inf"), best_G)
    return tl.where(taken_G[:, None], choice, float("-inf"))
