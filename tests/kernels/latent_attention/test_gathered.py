"""Latent attention over pages against a naive one in float64; pages of others are NaN."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from kernel_accuracy import TOLERANCES, random_tensor, relative_error
from torch import Tensor

from rayllm_kernels.kv_cache.reference import write_latent
from rayllm_kernels.latent_attention.gathered import (
    gathered_latent_decode,
    latent_attention,
    plain_latent_attention,
)

BLOCK_SIZE = 4


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("num_heads", "latent_dim", "width"), [(6, 24, 32), (1, 8, 10), (5, 16, 16)])
def test_decode_of_two_rows_equals_float64(num_heads: int, latent_dim: int, width: int, dtype: torch.dtype) -> None:
    lens, tables = (11, 5), ((7, 2, 4), (1, 6, 1))
    cache = torch.full((9, 1, BLOCK_SIZE, width), math.nan, dtype=dtype)
    rows = [random_tensor(length, width, dtype=dtype, seed=length) for length in lens]
    mask_B1L = torch.full((2, 1, 3 * BLOCK_SIZE), -math.inf, dtype=dtype)
    for row, (length, table, latents) in enumerate(zip(lens, tables, rows, strict=True)):
        cache[list(table)] = 1e3
        slots = [table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(length)]
        write_latent(latents, cache, torch.tensor(slots))
        mask_B1L[row, :, :length] = 0
    q_BHW = random_tensor(2, num_heads, width, dtype=dtype)
    workspace = torch.full((1024,), math.nan, dtype=dtype)
    found = gathered_latent_decode(q_BHW, cache, torch.tensor(tables).flatten(), mask_B1L, 0.3, latent_dim, workspace)
    expected = torch.stack(
        [
            (q.double() @ latents.double().T * 0.3).softmax(-1) @ latents[:, :latent_dim].double()
            for q, latents in zip(q_BHW, rows, strict=True)
        ]
    )
    assert relative_error(found, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("attend", [latent_attention, plain_latent_attention])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_queries_may_share_the_latents_of_one_row(attend: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """As the tokens of a chunk, each with a mask of its own; fused and by plain products."""
    q_BHW, latents = random_tensor(3, 4, 10, dtype=dtype), random_tensor(7, 10, dtype=dtype, seed=1)
    positions = torch.tensor([4, 5, 6]).view(3, 1, 1)
    mask_B1L = torch.zeros(3, 1, 7, dtype=dtype).masked_fill(torch.arange(7) > positions, -math.inf)
    found = attend(q_BHW, latents.expand(3, -1, -1), mask_B1L, 0.3, 8)
    expected = torch.stack(
        [
            (q.double() @ latents[:end].double().T * 0.3).softmax(-1) @ latents[:end, :8].double()
            for q, end in zip(q_BHW, (5, 6, 7), strict=True)
        ]
    )
    assert relative_error(found, expected) < TOLERANCES[dtype]
