"""Parameters out of the tensors of a checkpoint, by the conversions that `transformers` declares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import EXPERTS, foreign_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import Chunk, Interleave, Transpose, WeightConverter

from rayllm.errors import ConfigError
from rayllm.models.fallback.names import Joined, One, Piece, Stacked, Swapped, _converted, stored_parameters
from rayllm.weights.checkpoint import Checkpoint


def model_of(path: Path) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    tensors = {"a": torch.arange(12.0).view(4, 3), "b": torch.arange(12.0, 24.0).view(4, 3), "w": torch.zeros(2, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path)


A, B = One((), "a"), One((), "b")
PAIRS = Joined((Stacked((A, B)), Stacked((B, A))), 1)


@pytest.mark.parametrize(
    ("made", "whole"),
    [
        (A, lambda a, b: a),
        (Stacked((A, B)), lambda a, b: torch.stack((a, b))),
        (Joined((A, B), 0), lambda a, b: torch.cat((a, b))),
        (Joined((A, B), 1), lambda a, b: torch.cat((a, b), 1)),
        (PAIRS, lambda a, b: torch.stack((torch.cat((a, b)), torch.cat((b, a))))),
        (Piece((A,), 0, 1, 2), lambda a, b: a[1:3]),
        (Swapped((Stacked((A, B)),), (1, 2)), lambda a, b: torch.stack((a, b)).transpose(1, 2)),
    ],
    ids=["one", "stacked", "joined", "joined-1", "experts", "piece", "swapped"],
)  # fmt: skip
def test_any_region_is_that_of_the_whole_and_reads_its_bytes_only(
    checkpoint: Checkpoint, made: Any, whole: Any
) -> None:
    a, b = torch.arange(12.0).view(4, 3), torch.arange(12.0, 24.0).view(4, 3)
    expected = whole(a, b)
    made.check(checkpoint, expected.shape)
    assert checkpoint.unused() in (["b", "w"], ["w"])
    for dim in range(expected.dim()):
        region = [range(size) for size in expected.shape]
        region[dim] = range(1, expected.shape[dim])
        before = checkpoint.bytes_read
        found = made.read(checkpoint, tuple(region))
        assert torch.equal(found, expected.narrow(dim, 1, expected.shape[dim] - 1))
        assert checkpoint.bytes_read - before == found.numel() * 4


def test_a_parameter_of_another_shape_is_refused_by_tensor(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"tensor 'a' makes a parameter of shape \[2, 4, 3\].*requires \[3, 4, 3\]"):
        Stacked((A, B)).check(checkpoint, (3, 4, 3))
    with pytest.raises(ConfigError, match="'a' to 'w' differ in shape"):
        Stacked((A, One((), "w"))).check(checkpoint, (2, 4, 3))


def test_experts_stored_one_by_one_are_stacked(tmp_path: Path) -> None:
    path = foreign_checkpoint(tmp_path, "dots1", **EXPERTS)
    file, found = Checkpoint(path), stored_parameters(model_of(path), Checkpoint(path))
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in file.names()
    assert found["model.layers.1.mlp.experts.gate_up_proj"].shape(file) == (4, 64, 64)
    assert set(found) == set(model_of(path).state_dict())


def test_a_checkpoint_of_the_base_model_and_one_without_its_tied_head_are_whole(tmp_path: Path) -> None:
    path = foreign_checkpoint(tmp_path, "granite", tie_word_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    save_file({name.removeprefix("model."): each for name, each in tensors.items()}, path / "model.safetensors")
    found = stored_parameters(model_of(path), Checkpoint(path))
    assert set(found) == set(model_of(path).state_dict())
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"] == One((), "embed_tokens.weight")


def test_conversions_are_translated_and_others_refused_by_name(checkpoint: Checkpoint) -> None:
    split = WeightConverter("gate_up", ["gate", "up"], [Chunk(dim=0)])
    shapes = {"gate": (2, 3), "up": (2, 3)}
    expected = {"gate": Piece((A,), 0, 0, 2), "up": Piece((A,), 0, 2, 2)}
    assert _converted(split, "gate", {"gate_up": [A]}, shapes, checkpoint) == expected
    for shape, made in (((4, 3), A), ((3, 4), Swapped((A,), (0, 1)))):
        turned = WeightConverter("x", "y", [Transpose(0, 1, check_dims=True)])
        assert _converted(turned, "y", {"x": [A]}, {"y": shape}, checkpoint) == {"y": made}
    with pytest.raises(ConfigError, match="tensor 'a' needs the conversion Interleave of transformers"):
        _converted(WeightConverter("x", "y", [Interleave(dim=0)]), "y", {"x": [A]}, {"y": (4, 3)}, checkpoint)
