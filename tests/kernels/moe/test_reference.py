"""The choice of experts and their sums against their definitions, one token at a time."""

from __future__ import annotations

import pytest
import torch
from expert_cases import CASES, NO_TOKEN, Case
from kernel_accuracy import TOLERANCES, random_tensor, relative_error

from rayllm_kernels.moe.reference import choose_experts, mix_experts


def _choice(logits: list[float], top_k: int, scoring: str, bias: list[float] | None, groups: tuple[int, int, int]):
    """(experts, scores) of one token in plain Python: `groups` are their number, how many count, and how many scores of
    a group are summed."""
    wide = torch.tensor(logits, dtype=torch.float64)
    scores = (wide.softmax(0) if scoring == "softmax" else wide.sigmoid()).tolist()
    choice = [score + (bias[i] if bias else 0.0) for i, score in enumerate(scores)]
    num_groups, top_groups, num_summed = groups
    size = len(logits) // num_groups
    members = [range(group * size, (group + 1) * size) for group in range(num_groups)]
    ranked = sorted(members, key=lambda group: -sum(sorted((choice[i] for i in group), reverse=True)[:num_summed]))
    allowed = [i for group in ranked[:top_groups] for i in group]
    experts = sorted(allowed, key=lambda i: -choice[i])[:top_k]
    return experts, [scores[i] for i in experts]


@pytest.mark.parametrize("groups", [(1, 1, 1), (4, 2, 1), (4, 2, 2)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_each_token_takes_the_best_experts_of_the_best_groups(
    scoring: str, with_bias: bool, groups: tuple[int, int, int]
) -> None:
    logits, bias = random_tensor(40, 12), random_tensor(12) if with_bias else None
    num_groups, top_groups, num_summed = groups
    options = {"num_groups": num_groups, "top_groups": top_groups, "group_score": ["max", "top2_sum"][num_summed - 1]}
    experts, scores = choose_experts(logits, bias, 3, scoring, renormalize=False, **options)
    for token in range(40):
        row = logits[token].tolist()
        found, weights = _choice(row, 3, scoring, None if bias is None else bias.tolist(), groups)
        assert experts[token].tolist() == found
        assert scores[token].tolist() == pytest.approx(weights, rel=1e-5)


def test_renormalized_scores_sum_to_the_scale() -> None:
    logits = random_tensor(9, 8)
    _, plain = choose_experts(logits, None, 3, "sigmoid", renormalize=False)
    _, scores = choose_experts(logits, None, 3, "sigmoid", renormalize=True, scale=2.5)
    assert torch.allclose(scores.sum(-1), torch.full((9,), 2.5))
    assert torch.allclose(scores / 2.5, plain / plain.sum(-1, keepdim=True))


def test_renormalized_softmax_is_the_softmax_of_the_chosen() -> None:
    logits = random_tensor(9, 8, dtype=torch.bfloat16)
    _, scores = choose_experts(logits, None, 3, "softmax", renormalize=True)
    assert torch.allclose(scores, logits.float().topk(3).values.softmax(-1), rtol=1e-5)


def test_sigmoids_that_vanish_give_zeros() -> None:
    _, scores = choose_experts(torch.full((1, 4), -200.0), None, 2, "sigmoid", renormalize=True)
    assert scores.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_are_the_sums_of_their_experts_and_what_is_added(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    assert relative_error(mix_experts(*inputs.args, **inputs.added), inputs.expected()) < TOLERANCES[dtype]


def test_no_token_gives_no_row() -> None:
    assert mix_experts(*NO_TOKEN.inputs(torch.float32).args).shape == (0, NO_TOKEN.width)
