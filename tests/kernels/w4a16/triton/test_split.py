from __future__ import annotations

import pytest

from rayllm_kernels.w4a16.triton.split import num_splits


@pytest.mark.parametrize(
    ("num_blocks", "num_tiles", "expected"),
    [
        (64, 56, 8),  # programs enough for every multiprocessor
        (224, 16, 2),
        (64, 16, 4),  # no part of less than four tiles
        (8, 3, 1),
        (2000, 56, 1),
    ],
)
def test_few_blocks_of_outputs_are_cut_into_parts_that_are_worth_it(
    num_blocks: int, num_tiles: int, expected: int
) -> None:
    assert num_splits(num_blocks, num_tiles) == expected
