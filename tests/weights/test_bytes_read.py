"""A rank reads the bytes of its part alone, however a parameter stands in the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rayllm.weights.checkpoint import Checkpoint
from rayllm.weights.checkpoint_weights import CheckpointWeights
from rayllm.weights.source import Outputs
from rayllm.weights.stored import Stack, Tensor, Transposed, interleaved_rows, split_rows

CPU = torch.device("cpu")
HEADS, HEAD, WIDTH, EXPERTS, INNER = 4, 8, 48, 6, 20
OUT = HEADS * HEAD
FUSED = split_rows("fused", OUT, 2 * HEAD)
INTERLEAVED = interleaved_rows("interleaved", HEADS, HEAD, HEAD, HEAD)
NAMES = {
    "plain": "plain",
    "q": FUSED[0],
    "k": FUSED[1],
    "transposed": Transposed(Tensor("transposed")),
    "interleaved.q": INTERLEAVED[0],
    "interleaved.k": INTERLEAVED[1],
    "interleaved.v": INTERLEAVED[2],
    "experts": Stack(Tensor("experts.{expert}")),
}
SHAPES = {
    "plain.weight": (OUT, WIDTH),
    "fused.weight": (OUT + 2 * HEAD, WIDTH),
    "transposed.weight": (WIDTH, OUT),
    "interleaved.weight": (3 * OUT, WIDTH),
    **{f"experts.{expert}.weight": (INNER, WIDTH) for expert in range(EXPERTS)},
}
ROWS = {"plain": OUT, "q": OUT, "k": 2 * HEAD, "transposed": OUT, "interleaved.q": OUT, "interleaved.v": OUT}


@pytest.fixture(params=["safetensors", "bin"])
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Checkpoint:
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    if request.param == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path)


def _weights(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> CheckpointWeights:
    return CheckpointWeights(checkpoint, NAMES, dtype, CPU)


def _part(size: int, rank: int, num_ranks: int) -> range:
    return range(size * rank // num_ranks, size * (rank + 1) // num_ranks)


@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("module", ROWS)
@pytest.mark.parametrize("dim", [0, 1])
def test_rows_or_columns_of_a_rank_are_all_that_is_read(
    checkpoint: Checkpoint, module: str, dim: int, rank: int, num_ranks: int
) -> None:
    shape = (ROWS[module], WIDTH)
    found = _weights(checkpoint).tensor(f"{module}.weight", shape, dim=dim, part=_part(shape[dim], rank, num_ranks))
    assert checkpoint.bytes_read == found.nbytes == ROWS[module] * WIDTH * 4 // num_ranks


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_experts_are_read_one_by_one(checkpoint: Checkpoint, num_ranks: int) -> None:
    own = _part(INNER, num_ranks - 1, num_ranks)
    shape = (EXPERTS, INNER, WIDTH)
    found = list(_weights(checkpoint).expert_tensors("experts.weight", shape, range(2, 5), dim=0, part=own))
    assert len(found) == 3
    assert checkpoint.bytes_read == 3 * len(own) * WIDTH * 4


def test_a_layer_of_several_modules_reads_each_once_in_the_files_type(checkpoint: Checkpoint) -> None:
    outputs = [Outputs("interleaved.q", OUT, _part(OUT, 1, 2)), Outputs("interleaved.k", OUT, _part(OUT, 1, 2))]
    _weights(checkpoint, torch.bfloat16).linear(outputs, WIDTH)
    assert checkpoint.bytes_read == OUT * WIDTH * 4


def test_the_parts_of_all_ranks_join_to_the_whole(checkpoint: Checkpoint) -> None:
    for module, num_rows in ROWS.items():
        for dim in (0, 1):
            shape = (num_rows, WIDTH)
            whole = _weights(checkpoint).tensor(f"{module}.weight", shape)
            parts = [
                _weights(checkpoint).tensor(f"{module}.weight", shape, dim=dim, part=_part(shape[dim], rank, 2))
                for rank in (0, 1)
            ]
            assert torch.equal(torch.cat(parts, dim=dim), whole), (module, dim)
