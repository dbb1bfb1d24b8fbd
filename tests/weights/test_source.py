"""Dummy weights are a function of seed and name, cut alike whatever the number of ranks."""

from __future__ import annotations

import torch

from rayllm.weights.source import DummyWeights, clip, pad_to

CPU = torch.device("cpu")


def _dummy(seed: int = 0) -> DummyWeights:
    return DummyWeights(seed, torch.float32, CPU)


def test_parts_of_a_dummy_weight_join_to_the_whole() -> None:
    whole = _dummy().tensor("layers.0.q.weight", (6, 4))
    rows = [_dummy().tensor("layers.0.q.weight", (6, 4), part=part) for part in (range(3), range(3, 6))]
    columns = [_dummy().tensor("layers.0.q.weight", (6, 4), dim=1, part=part) for part in (range(2), range(2, 4))]
    assert torch.equal(torch.cat(rows), whole)
    assert torch.equal(torch.cat(columns, dim=1), whole)


def test_dummy_weights_depend_on_seed_and_name() -> None:
    one = _dummy().tensor("layers.0.q.weight", (6, 4))
    assert not torch.equal(one, _dummy(1).tensor("layers.0.q.weight", (6, 4)))
    assert not torch.equal(one, _dummy().tensor("layers.1.q.weight", (6, 4)))


def test_a_part_past_the_end_is_zero() -> None:
    part = _dummy().tensor("embedding.weight", (5, 4), part=range(3, 6))
    assert part.shape == (3, 4)
    assert torch.equal(part[2], torch.zeros(4))
    assert bool(part[:2].abs().sum() > 0)
    assert _dummy().tensor("embedding.weight", (5, 4), part=range(6, 9)).abs().sum() == 0


def test_clip_and_pad_agree_on_sizes() -> None:
    assert clip(range(4, 8), 6) == range(4, 6)
    assert len(clip(range(8, 12), 6)) == 0
    assert pad_to(torch.ones(2, 3), 1, 5).shape == (2, 5)


def test_parts_of_dummy_experts_join_to_the_whole_and_each_is_another() -> None:
    name, shape = "layers.0.experts.up.weight", (4, 6, 8)
    whole = list(_dummy().expert_tensors(name, shape, range(4)))
    assert [tuple(expert.shape) for expert in whole] == [(6, 8)] * 4
    assert not torch.equal(whole[0], whole[1])
    assert torch.equal(next(_dummy().expert_tensors(name, shape, range(2, 4))), whole[2])
    for dim, size in enumerate(shape[1:]):
        halves = [
            next(_dummy().expert_tensors(name, shape, range(1, 2), dim=dim, part=part))
            for part in (range(size // 2), range(size // 2, size))
        ]
        assert torch.equal(torch.cat(halves, dim=dim), whole[1])
    assert 0.8 < float(torch.cat(whole).std()) * 8**0.5 < 1.2
