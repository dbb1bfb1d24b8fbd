"""Log-probabilities against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayllm.messages import TokenLogprobs
from rayllm.sampling.logprobs import compute_logprobs, padded_lists
from rayllm.transfer.download import Download


def token_logprobs(logits_NV: torch.Tensor, token_ids_N: torch.Tensor, num_top: int) -> list[TokenLogprobs | None]:
    tensors = compute_logprobs(logits_NV, token_ids_N, [num_top] * len(token_ids_N))
    return tensors.to_host(Download(torch.device("cpu"))).to_messages()


def unpacked(found: TokenLogprobs) -> tuple[list[int], np.ndarray]:
    return np.frombuffer(found.ids, dtype="<i4").tolist(), np.frombuffer(found.values, dtype="<f4")


@pytest.mark.parametrize("vocab_size", [30, 1000, 50_257])
@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_values_ids_and_ranks_are_those_of_float64(vocab_size: int, num_top: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size + num_top)
    logits_NV = torch.randn(9, vocab_size, generator=generator) * 5
    token_ids_N = torch.randint(vocab_size, (9,), generator=generator)
    token_ids_N[0] = logits_NV[0].argmax()
    exact_NV = logits_NV.double().log_softmax(1)
    for found, exact_V, token_id in zip(
        token_logprobs(logits_NV, token_ids_N, num_top), exact_NV, token_ids_N.tolist()
    ):
        ids, values = unpacked(found)
        assert ids == [token_id, *exact_V.argsort(descending=True)[:num_top].tolist()]
        np.testing.assert_allclose(values, exact_V[ids].numpy(), rtol=2e-6, atol=1e-6)
        assert found.rank == 1 + int((exact_V > exact_V[token_id]).sum())


def test_equal_tokens_share_a_rank_and_come_in_order_of_ids() -> None:
    logits_1V = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0]])
    found = token_logprobs(logits_1V, torch.tensor([3]), 4)[0]
    assert unpacked(found)[0] == [3, 1, 3, 2, 4]
    assert found.rank == 1
    assert token_logprobs(logits_1V, torch.tensor([4]), 0)[0].rank == 3


def test_a_small_vocabulary_gives_all_it_has() -> None:
    found = token_logprobs(torch.randn(2, 3), torch.tensor([0, 1]), 20)
    assert [len(unpacked(one)[0]) for one in found] == [4, 4]


def test_values_do_not_depend_on_the_other_positions() -> None:
    logits_NV = torch.randn(40, 20_011)
    token_ids_N = torch.arange(40)
    together = token_logprobs(logits_NV, token_ids_N, 5)
    alone = [token_logprobs(logits_NV[i : i + 1], token_ids_N[i : i + 1], 5)[0] for i in range(40)]
    assert together == alone


def test_masked_tokens_have_minus_infinity_and_do_not_disturb() -> None:
    logits_1V = torch.tensor([[0.0, -torch.inf, 0.0]])
    _, values = unpacked(token_logprobs(logits_1V, torch.tensor([1]), 2)[0])
    np.testing.assert_allclose(values, [-np.inf, -np.log(2), -np.log(2)], rtol=1e-6)


def test_nan_gives_its_line_no_logprob_and_others_theirs() -> None:
    logits_NV = torch.randn(3, 50)
    logits_NV[1, 40] = torch.nan
    found = token_logprobs(logits_NV, torch.tensor([1, 2, 3]), 0)
    assert [entry is None for entry in found] == [False, True, False]


def test_listed_tokens_come_in_place_of_the_most_likely_beside_lines_that_list_none() -> None:
    logits_NV = torch.randn(3, 1000, generator=torch.Generator().manual_seed(3)) * 5
    token_ids_N, exact_NV = torch.tensor([4, 5, 6]), logits_NV.double().log_softmax(1)

    listed_NK = padded_lists([2, 3, 0], [(900, 5), None, None])
    assert listed_NK is not None
    tensors = compute_logprobs(logits_NV, token_ids_N, [2, 3, 0], torch.from_numpy(listed_NK))
    messages = tensors.to_host(Download(torch.device("cpu"))).to_messages()
    found = [unpacked(entry) for entry in messages if entry is not None]

    top = exact_NV[1].argsort(descending=True)[:3].tolist()
    assert [ids for ids, _ in found] == [[4, 900, 5], [5, *top], [6]]
    for (ids, values), exact_V in zip(found, exact_NV):
        np.testing.assert_allclose(values, exact_V[ids].numpy(), rtol=2e-6, atol=1e-6)
