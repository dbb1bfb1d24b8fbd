"""The choice of experts in one launch against the reference, which `test_reference.py` checks by its definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_accuracy import Buffers, random_tensor, relative_error

from rayllm_kernels.moe import reference
from rayllm_kernels.moe.triton import choose_experts

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "best groups": {"num_groups": 4, "top_groups": 2},
    "groups by two": {"num_groups": 4, "top_groups": 3, "group_score": "top2_sum"},
    "scaled": {"scale": 2.5},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("scoring", "bias", "renormalize"), [("softmax", False, True), ("sigmoid", True, False)])
def test_experts_and_scores_are_those_of_the_reference(
    name: str, scoring: str, bias: bool, renormalize: bool, dtype: torch.dtype, buffers: Buffers
) -> None:
    logits = buffers.input(torch.stack([torch.randperm(20) for _ in range(3)]).div(8).to(dtype))  # no two are equal
    choice_bias = buffers.input(random_tensor(20)) if bias else None
    options = {"renormalize": renormalize, **OPTIONS[name]}
    experts, scores = choose_experts(logits, choice_bias, 3, scoring, **options)
    expected, expected_scores = reference.choose_experts(logits.double().float(), choice_bias, 3, scoring, **options)
    assert torch.equal(experts, expected.int())
    assert relative_error(scores, expected_scores.double()) < 1e-6


def test_of_equals_the_first_is_taken() -> None:
    experts, _ = choose_experts(torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0]]), None, 4, "softmax", renormalize=True)
    assert experts.tolist() == [[1, 3, 0, 2]]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_nan_is_among_the_scores_and_experts_exist(scoring: str) -> None:
    logits = torch.tensor([[0.0, math.nan, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0, 4.0], [math.nan] * 5])
    experts, scores = choose_experts(logits, None, 2, scoring, renormalize=False)
    assert scores.isnan().any(1).tolist() == [True, False, True]
    assert experts.min() >= 0
    assert experts.max() < 5
    assert all(len(set(row)) == 2 for row in experts.tolist())


def test_sigmoids_that_vanish_give_zeros() -> None:
    _, scores = choose_experts(torch.full((1, 4), -200.0), None, 2, "sigmoid", renormalize=True)
    assert scores.tolist() == [[0.0, 0.0]]
