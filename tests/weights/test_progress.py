"""How far the weights of a rank are read, in bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import make_checkpoint

from rayllm.distributed.groups import TensorParallel
from rayllm.errors import EngineError
from rayllm.models import load_model
from rayllm.models.registry import read_spec
from rayllm.weights.progress import LoadProgress, progress_text
from rayllm.weights.safetensors_header import folder_tensors


def test_a_rank_of_two_expects_half_and_learns_of_tensors_that_are_not_split() -> None:
    progress = LoadProgress(2)
    assert progress.numbers() == (0, 0)
    progress.begin(1000)
    assert progress.numbers() == (0, 500)
    progress.see(600)
    assert progress.numbers() == (0, 500), "what is seen will be read"
    progress.read(300)
    assert progress.numbers() == (300, 500)
    progress.see(400)
    progress.read(400)  # one that every rank reads whole
    assert progress.numbers() == (700, 700)
    progress.begin(100)
    assert progress.numbers() == (0, 50)


def test_numbers_are_shown_in_gigabytes() -> None:
    assert progress_text(1_204_000_000, 2_020_000_000) == "1.20 of 2.02 GB"


@pytest.mark.parametrize("tp", [TensorParallel(), TensorParallel(0, 2), TensorParallel(1, 2)])
def test_loading_a_model_ends_with_all_bytes_read(tp: TensorParallel, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, tokenizer=False)
    progress, cpu = LoadProgress(tp.size), torch.device("cpu")
    load_model(str(folder), read_spec(folder), tp, dtype=torch.float32, device=cpu, progress=progress)
    whole = sum(entry.num_bytes for entry in folder_tensors(folder).values())
    bytes_read, num_bytes = progress.numbers()
    assert bytes_read == num_bytes
    assert whole // tp.size <= bytes_read < whole // tp.size + 5000


def test_loading_that_nobody_wants_any_more_ends_at_the_next_tensor(tmp_path: Path) -> None:
    folder, progress = make_checkpoint(tmp_path, tokenizer=False), LoadProgress()
    spec, cpu = read_spec(folder), torch.device("cpu")
    progress.cancel()
    with pytest.raises(EngineError, match="loading was cancelled"):
        load_model(str(folder), spec, TensorParallel(), dtype=torch.float32, device=cpu, progress=progress)
