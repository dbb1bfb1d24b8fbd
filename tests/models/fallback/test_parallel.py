"""The words of tensor-parallel plans, one rank after another: what they compute together is what one computes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from foreign import EXPERTS, foreign_checkpoint
from golden import check_against_transformers
from ranks import RankPool
from torch import Tensor, nn

from rayllm.distributed.groups import TensorParallel
from rayllm.models.fallback.parallel import SplitEmbedding, halves, make_linear, read_parameter
from rayllm.weights.source import DummyWeights

SOURCE = DummyWeights(3, torch.float32, torch.device("cpu"))
WEIGHT = SOURCE.tensor("m.weight", (8, 12))
X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


class Recorded(TensorParallel):
    """Collectives that see this rank's part alone."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather_last(self, x: Tensor) -> Tensor:
        return x


def outputs(word: str, inputs: list[Tensor]) -> list[Tensor]:
    module = nn.Linear(12, 8, bias=False, device="meta")
    return [make_linear(SOURCE, "m", module, word, Recorded(rank, 2))(inputs[rank]) for rank in range(2)]


def test_a_mixture_of_experts_equals_transformers(tmp_path: Path, two_ranks: RankPool) -> None:
    check_against_transformers(foreign_checkpoint(tmp_path, "dots1", **EXPERTS), two_ranks)


@pytest.mark.parametrize("word", ["colwise", "colwise_rep"])
def test_ranks_compute_outputs_one_after_another(word: str) -> None:
    torch.testing.assert_close(torch.cat(outputs(word, [X, X]), dim=-1)[..., :8], X @ WEIGHT.t())


@pytest.mark.parametrize("word", ["rowwise_split_input", "rowwise_rep"])
def test_ranks_take_their_part_of_whole_inputs(word: str) -> None:
    torch.testing.assert_close(sum(outputs(word, [X, X])), X @ WEIGHT.t())


def test_ranks_have_their_part_of_inputs() -> None:
    torch.testing.assert_close(sum(outputs("rowwise", [X[..., :6], X[..., 6:]])), X @ WEIGHT.t())


def test_fused_outputs_are_split_within_each_half() -> None:
    first, second = outputs("packed_colwise", [X, X])
    (gate, up), whole = (torch.cat((first[..., i : i + 2], second[..., i : i + 2]), -1) for i in (0, 2)), X @ WEIGHT.t()
    torch.testing.assert_close(torch.cat((gate, up), -1), whole)


def test_fused_inputs_are_split_within_each_half() -> None:
    parts = [
        torch.cat([X[..., part.start : part.stop] for part in halves(12, "m", Recorded(rank, 2))], -1)
        for rank in (0, 1)
    ]
    torch.testing.assert_close(sum(outputs("packed_rowwise", parts)), X @ WEIGHT.t())


@pytest.mark.parametrize("word", ["rowwise", "packed_rowwise"])
def test_a_bias_enters_the_sum_once(word: str) -> None:
    module = nn.Linear(12, 8, device="meta")
    found = [make_linear(SOURCE, "m", module, word, Recorded(rank, 2)) for rank in range(2)]
    assert [linear._linear._bias is not None for linear in found] == [True, False]  # type: ignore[attr-defined]


def test_a_padded_vocabulary_is_split_and_its_rows_summed() -> None:
    table = torch.randn(7, 3)
    ids = torch.tensor([[0, 3, 4, 6]])
    parts = []
    for rank, part in enumerate((range(4), range(4, 8))):
        inner = nn.Embedding(4, 3, padding_idx=0)
        inner.weight.data = torch.cat((table, torch.zeros(1, 3)))[part.start : part.stop]
        parts.append(SplitEmbedding(inner, part, Recorded(rank, 2))(ids))
    torch.testing.assert_close(sum(parts), table[ids])


def test_stacked_experts_are_cut_as_their_words_say() -> None:
    whole = SOURCE.tensor("e", (3, 4, 6))
    tp = Recorded(1, 2)
    assert torch.equal(read_parameter(SOURCE, "e", (3, 4, 6), "packed_colwise", tp, torch.float32), whole[:, [1, 3]])
    assert torch.equal(read_parameter(SOURCE, "e", (3, 4, 6), "colwise", tp, torch.float32), whole[:, 2:])
    assert torch.equal(read_parameter(SOURCE, "e", (3, 4, 6), "rowwise", tp, torch.float32), whole[:, :, 3:])
    wide = SOURCE.tensor("w", (3, 4, 8))
    assert torch.equal(
        read_parameter(SOURCE, "w", (3, 4, 8), "packed_rowwise", tp, torch.float32), wide[:, :, [2, 3, 6, 7]]
    )
    assert torch.equal(read_parameter(SOURCE, "e", (3, 4, 6), "replicate", tp, torch.float32), whole)
    with pytest.raises(ValueError, match="'rowwise' of parameter e with shape"):
        read_parameter(SOURCE, "e", (3, 4), "rowwise", tp, torch.float32)


def test_what_does_not_divide_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="outputs of m=9 cannot be split evenly"):
        make_linear(SOURCE, "m", nn.Linear(12, 9, device="meta"), "colwise", Recorded(0, 2))
