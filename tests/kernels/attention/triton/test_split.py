"""Programs that share a line's keys."""

from __future__ import annotations

import pytest
import torch
from kernel_accuracy import KERNEL_TOLERANCES, Buffers, relative_error
from paged_attention import SCORINGS, Case, Step

from rayllm_kernels.attention import Scoring
from rayllm_kernels.attention.triton import split

LONG = ((300, 1), (0, 0), (47, 1), (129, 1))
NUM_ARRIVALS_OF_NO_SPLIT = 7
"""Too few for 4 lines times 2 heads."""


@pytest.mark.parametrize("scoring", [SCORINGS["plain"], SCORINGS["all"]], ids=["plain", "all"])
def test_parts_of_a_line_join_to_what_one_program_finds(
    scoring: Scoring, buffers: Buffers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "_MIN_KEYS", 128)
    step = Step(Case(LONG, scoring=scoring), buffers)
    parted, expected = step.decode(buffers)
    whole, _ = step.decode(buffers, NUM_ARRIVALS_OF_NO_SPLIT)
    assert relative_error(parted, expected) < KERNEL_TOLERANCES[torch.float32]
    assert torch.equal(parted, whole) == (scoring.window is not None)  # a window is one part


@pytest.mark.kernels
def test_eight_parts_differ_from_one_by_rounding_alone(buffers: Buffers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "_MIN_KEYS", 32)
    monkeypatch.setattr(split, "_MAX_SPLITS", 8)
    step = Step(Case(LONG, dtype=torch.bfloat16), buffers)
    parted, whole = step.decode(buffers)[0], step.decode(buffers, NUM_ARRIVALS_OF_NO_SPLIT)[0]
    assert relative_error(parted, whole.double()) < 2e-3


def test_the_number_of_programs_follows_from_shapes_alone() -> None:
    assert split.num_splits(8, 1024, 100, 528) == 8
    assert split.num_splits(2048, 8192, 10000, 528) == 1
    assert split.num_splits(2048, 131072, 10000, 528) == 4  # one long line among many is not one program's
    assert split.num_splits(2048, 131072, 2047, 528) == 1
    assert split.num_splits(1, 131072, 10000, 528) == 64
