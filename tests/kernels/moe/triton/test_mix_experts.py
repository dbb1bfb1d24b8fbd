"""Mixtures of experts on a GPU against float64, one token at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from expert_cases import CASES, NO_TOKEN, Case, Inputs
from kernel_accuracy import KERNEL_TOLERANCES, Buffers, relative_error
from torch import Tensor

from rayllm_kernels.launch import observed
from rayllm_kernels.moe.triton import mix_experts


def _guarded(inputs: Inputs, buffers: Buffers) -> Inputs:
    x, experts, scores, weights = inputs.args
    names = ("gate_up_E2ID", "gate_up_bias_E2I", "down_EDI", "down_bias_ED")
    stacked = {name: buffers.input(getattr(weights, name)) for name in names if getattr(weights, name) is not None}
    args = (buffers.input(x), buffers.input(experts), buffers.input(scores), replace(weights, **stacked))
    return Inputs(args, {name: buffers.input(values) for name, values in inputs.added.items()})


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", KERNEL_TOLERANCES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_are_the_sums_of_their_experts_and_what_is_added(
    case: Case, dtype: torch.dtype, buffers: Buffers
) -> None:
    inputs = _guarded(case.inputs(dtype), buffers)
    found = mix_experts(*inputs.args, **inputs.added)
    assert found.dtype == dtype
    assert found.shape == inputs.args[0].shape
    assert relative_error(found, inputs.expected()) < KERNEL_TOLERANCES[dtype]


def test_no_token_gives_no_row() -> None:
    assert mix_experts(*NO_TOKEN.inputs(torch.float32).args).shape == (0, NO_TOKEN.width)


def test_inputs_may_be_parts_of_wider_rows() -> None:
    inputs = Case().inputs(torch.float32)
    x, *others = inputs.args
    wide = torch.full((len(x), x.shape[1] + 5), torch.nan)
    wide[:, : x.shape[1]] = x
    assert torch.equal(mix_experts(wide[:, : x.shape[1]], *others), mix_experts(x, *others))


def test_a_token_gets_the_same_bits_whatever_others_are_in_the_step() -> None:
    inputs = Case(width=65).inputs(torch.bfloat16)
    x, experts, scores, weights = inputs.args
    together = mix_experts(x, experts, scores, weights)
    order = torch.tensor([6, 2, 4])
    assert torch.equal(mix_experts(x[order], experts[order], scores[order], weights), together[order])


def test_nan_stays_in_its_token() -> None:
    x, experts, scores, weights = Case().inputs(torch.float32).args
    expected = mix_experts(x, experts, scores, weights)
    x[2] = torch.nan
    found = mix_experts(x, experts, scores, weights)
    assert found[2].isnan().all()
    others = torch.tensor([0, 1, 3, 4, 5, 6])
    assert torch.equal(found[others], expected[others])


def test_a_mixture_is_four_launches_with_grids_that_follow_from_shapes() -> None:
    seen: dict[str, list[tuple[int, ...]]] = {}

    def mixed(experts: Tensor) -> None:
        x, _, scores, weights = Case().inputs(torch.bfloat16).args
        mix_experts(x, experts, scores, weights)

    with observed(lambda kernel, grid, args, constants: seen.setdefault(kernel.__name__, []).append(grid)):
        for fill in (0, 6):
            mixed(torch.full((7, 2), fill, dtype=torch.int32))
    assert list(seen) == ["sort_kernel", "gate_up_kernel", "down_kernel", "combine_kernel"]
    assert all(len(grids) == 2 and grids[0] == grids[1] for grids in seen.values())
