"""Parameters that are rows, a transposed form or a stack of checkpoint tensors, whole and cut, and what is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rayllm.errors import ConfigError
from rayllm.weights.checkpoint import Checkpoint
from rayllm.weights.checkpoint_weights import CheckpointWeights, WeightNames
from rayllm.weights.stored import (
    FirstOf,
    Ones,
    Rows,
    Stack,
    Stored,
    Tensor,
    Transposed,
    UnitRows,
    interleaved_rows,
    split_rows,
)

WHOLE = torch.arange(24 * 6, dtype=torch.float32).view(24, 6)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    experts = {f"experts.{i}.up": WHOLE[4 * i : 4 * i + 4].clone() for i in range(3)}
    tensors = {"fused.weight": WHOLE, "fused.bias": WHOLE[:, 0].clone(), "ids": torch.arange(4), **experts}
    save_file(tensors, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path)


def _read(checkpoint: Checkpoint, place: str | Stored, shape: tuple[int, ...], **cut: object) -> torch.Tensor:
    weights = CheckpointWeights(checkpoint, {"layers.x.weight": place}, torch.float32, torch.device("cpu"))
    return weights.tensor("layers.0.x.weight", shape, **cut)  # type: ignore[arg-type]


FUSED = split_rows("fused.weight", 12, 4, 8)
GROUPED = interleaved_rows("fused.weight", 2, 8, 2, 2)
PLACES: dict[str, tuple[Stored, torch.Tensor]] = {
    "a tensor": (Tensor("fused.weight"), WHOLE),
    "first of three": (FUSED[0], WHOLE[:12]),
    "last of three": (FUSED[2], WHOLE[16:]),
    "queries of two groups": (GROUPED[0], torch.cat((WHOLE[:8], WHOLE[12:20]))),
    "values of two groups": (GROUPED[2], torch.cat((WHOLE[10:12], WHOLE[22:24]))),
    "even rows, then odd ones": (
        Rows(Tensor("fused.weight"), (range(0, 24, 2), range(1, 24, 2)), 24),
        torch.cat((WHOLE[::2], WHOLE[1::2])),
    ),
    "the only one of two that there is": (FirstOf((Tensor("none.weight"), Tensor("fused.weight"))), WHOLE),
    "the first of two that there are": (FirstOf((Tensor("fused.weight"), Tensor("experts.0.up"))), WHOLE),
    "transposed": (Transposed(Tensor("fused.weight")), WHOLE.t()),
    "ones in no file": (Ones(), torch.ones(4, 6)),
    "rows of length one": (UnitRows(Tensor("fused.weight"), 6), WHOLE / WHOLE.norm(dim=1, keepdim=True)),
    "columns of a transposed one": (Rows(Transposed(Tensor("fused.weight")), (range(2, 4),), 6), WHOLE.t()[2:4]),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_cut_is_that_of_the_whole_parameter(place: str, checkpoint: Checkpoint) -> None:
    stored, expected = PLACES[place]
    shape = tuple(expected.shape)
    assert torch.equal(_read(checkpoint, stored, shape), expected)
    for dim, size in enumerate(shape):
        for part in (range(size // 2), range(size // 2, size), range(1, size - 1)):
            found = _read(checkpoint, stored, shape, dim=dim, part=part)
            assert torch.equal(found, expected.narrow(dim, part.start, len(part))), (dim, part)


def test_experts_are_stacked_and_cut_inside_each(checkpoint: Checkpoint) -> None:
    stack, expected = Stack(Tensor("experts.{expert}.up")), WHOLE[:12].view(3, 4, 6)
    assert torch.equal(_read(checkpoint, stack, (3, 4, 6)), expected)
    assert torch.equal(_read(checkpoint, stack, (3, 4, 6), dim=0, part=range(1, 3)), expected[1:])
    assert torch.equal(_read(checkpoint, stack, (3, 4, 6), dim=2, part=range(2, 5)), expected[:, :, 2:5])
    with pytest.raises(ConfigError, match=r"no tensor 'experts\.3\.up'"):
        _read(checkpoint, stack, (4, 4, 6))


@pytest.mark.parametrize("expert", [range(3), range(1, 2)])
def test_rows_and_columns_of_each_expert_of_one_tensor_are_cut(expert: range, tmp_path: Path) -> None:
    whole = torch.arange(3 * 4 * 6, dtype=torch.float32).view(3, 4, 6)
    save_file({"experts": whole}, tmp_path / "model.safetensors")
    checkpoint, odd = Checkpoint(tmp_path), (range(1, 6, 2),)
    place = Rows(Transposed(Tensor("experts")), odd, 6, dim=1)
    place.check(checkpoint, (3, 3, 4))
    found = place.read(checkpoint, (expert, range(1, 3), range(2, 4)))
    assert torch.equal(found, whole.transpose(1, 2)[expert.start : expert.stop, 1::2][:, 1:3, 2:4])


def test_a_fault_of_one_of_several_places_names_the_tensor_that_is_there(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"tensor 'ids' has dtype torch\.int64"):
        _read(checkpoint, FirstOf((Tensor("split.weight"), Tensor("ids"))), (4,))


def test_only_the_bytes_of_a_cut_are_read(checkpoint: Checkpoint) -> None:
    _read(checkpoint, FUSED[0], (12, 6), part=range(6, 12))
    assert checkpoint.bytes_read == 6 * 6 * 4
    _read(checkpoint, GROUPED[1], (4, 6), part=range(2))
    assert checkpoint.bytes_read == (6 + 2) * 6 * 4


def test_a_module_name_serves_weight_and_bias_of_a_fused_tensor(checkpoint: Checkpoint) -> None:
    names: WeightNames = {"layers.k": split_rows("fused", 12, 4, 8)[1]}
    weights = CheckpointWeights(checkpoint, names, torch.float32, torch.device("cpu"))
    assert torch.equal(weights.tensor("layers.7.k.weight", (4, 6)), WHOLE[12:16])
    assert torch.equal(weights.tensor("layers.7.k.bias", (4,)), WHOLE[12:16, 0])


def test_a_fused_tensor_of_another_size_is_refused_with_both_shapes(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"'fused\.weight' has shape \[24, 6\], but config\.json requires \[20, 6\]"):
        _read(checkpoint, split_rows("fused.weight", 12, 4, 4)[0], (12, 6))


def test_whole_numbers_are_read_but_are_no_parameter(checkpoint: Checkpoint) -> None:
    assert checkpoint.read("ids", [range(1, 3)]).tolist() == [1, 2]
    with pytest.raises(ConfigError, match=r"'ids' has dtype torch\.int64: layers\.0\.x\.weight must be floating"):
        _read(checkpoint, "ids", (4,))


def test_what_another_rank_holds_counts_as_used(checkpoint: Checkpoint) -> None:
    names: WeightNames = {"layers.x": "fused", "layers.up.weight": Stack(Tensor("experts.{expert}.up"))}
    weights = CheckpointWeights(checkpoint, names, torch.float32, torch.device("cpu"))
    weights.tensor("layers.0.x.weight", (24, 6))
    weights.leave_to_others("layers.0.x.bias", (24,))
    weights.tensor("layers.0.up.weight", (3, 4, 6), part=range(1))
    assert checkpoint.unused() == ["ids"]


def test_of_several_places_none_of_which_is_there_the_first_is_named(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"the checkpoint has no tensor 'old\.weight'"):
        _read(checkpoint, FirstOf((Tensor("old.weight"), Tensor("new.weight"))), (24, 6))
