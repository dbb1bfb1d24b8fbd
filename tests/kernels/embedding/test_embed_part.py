"""Parts of an embedding, by both implementations."""

from __future__ import annotations

import pytest
import torch
from kernel_accuracy import KERNEL_TOLERANCES, Buffers, random_tensor

from rayllm_kernels.embedding import reference, triton


@pytest.mark.parametrize("implementation", [reference, triton])
@pytest.mark.parametrize("dtype", KERNEL_TOLERANCES)
@pytest.mark.parametrize("width", [5, 2050])
def test_parts_add_up_to_the_whole(implementation, dtype: torch.dtype, width: int, buffers: Buffers) -> None:
    weight = random_tensor(11, width, dtype=dtype)
    ids = torch.tensor([0, 10, 4, 3, 7, 4])
    parts = [(0, 4), (4, 7), (7, 11)]
    rows = [implementation.embed_part(ids, buffers.input(weight[begin:end]), begin) for begin, end in parts]
    assert torch.equal(sum(rows[1:], rows[0]), weight[ids])
    assert torch.equal(rows[1], weight[ids] * ((ids >= 4) & (ids < 7)).unsqueeze(1))
