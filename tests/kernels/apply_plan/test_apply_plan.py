"""The scatter of a plan's differences, by both implementations."""

from __future__ import annotations

import contextlib

import pytest
import torch

from rayllm_kernels.apply_plan import apply_plan
from rayllm_kernels.device import interpreted


def _int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture(params=["reference", "triton"], autouse=True)
def _implementation(request: pytest.FixtureRequest):
    with interpreted() if request.param == "triton" else contextlib.nullcontext():
        yield


def test_words_go_to_their_places_and_sampled_tokens_come_from_their_rows() -> None:
    state = torch.arange(12, dtype=torch.int32).view(2, 6)
    token_ids = torch.tensor([7, 0, 0, 9])
    last_token = torch.tensor([100, 101, 102])
    apply_plan(state, _int32(11, -1, 2), _int32(-5, 77, -6), token_ids, _int32(-1, 2, 0, -1), last_token)
    assert state.flatten().tolist() == [0, 1, -6, 3, 4, 5, 6, 7, 8, 9, 10, -5]
    assert token_ids.tolist() == [7, 102, 100, 9]
    assert last_token.tolist() == [100, 101, 102]


@pytest.mark.parametrize(("num_words", "num_tokens"), [(600, 3), (0, 301), (1, 0), (0, 0)])
def test_either_part_may_be_the_longer_one(num_words: int, num_tokens: int) -> None:
    state = torch.zeros(1000, dtype=torch.int32)
    indices = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:num_words]
    values = torch.arange(num_words, dtype=torch.int32) + 1
    expected = state.clone()
    expected[indices] = values
    token_ids, last_token = torch.zeros(num_tokens, dtype=torch.int64), torch.arange(5) * 10
    sources = torch.arange(num_tokens, dtype=torch.int32) % 5
    apply_plan(state, indices.int(), values, token_ids, sources, last_token)
    assert torch.equal(state, expected)
    assert torch.equal(token_ids, last_token[sources])
