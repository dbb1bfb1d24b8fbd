from __future__ import annotations

import pytest
import torch

from rayllm.distributed.groups import TensorParallel
from rayllm.layers.embedding import VocabEmbedding, vocab_part
from rayllm.weights.source import DummyWeights

CPU = torch.device("cpu")


def test_vocabulary_parts_cover_all_ids_and_pad_the_last() -> None:
    parts = [vocab_part(263, TensorParallel(rank, 4)) for rank in range(4)]
    assert [len(part) for part in parts] == [66] * 4
    assert [id_ for part in parts for id_ in part][:263] == list(range(263))


def test_each_rank_looks_up_only_its_own_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorParallel, "all_reduce", lambda self, x: x)
    weights = DummyWeights(0, torch.float32, CPU)
    ids = torch.tensor([0, 3, 4, 6])
    whole = VocabEmbedding(weights, "embedding", 7, 5, TensorParallel())(ids)
    parts = [VocabEmbedding(weights, "embedding", 7, 5, TensorParallel(rank, 2))(ids) for rank in range(2)]
    assert torch.equal(parts[0] + parts[1], whole)
    assert torch.equal(parts[0][2:], torch.zeros(2, 5))
