"""Keys and values in their slots; all other slots stay as they were."""

from __future__ import annotations

import pytest
import torch
from kernel_accuracy import TOLERANCES, random_tensor

from rayllm_kernels.kv_cache.reference import page_rows, write_kv, write_latent

BLOCK_SIZE = 4


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_write_kv_fills_its_slots_and_leaves_all_others_bit_for_bit(dtype: torch.dtype) -> None:
    cache = random_tensor(6, 3, BLOCK_SIZE, 5, dtype=dtype)
    k_cache, v_cache = cache.clone(), cache.clone() + 1
    k, v = random_tensor(4, 3, 5, dtype=dtype, seed=1), random_tensor(4, 3, 5, dtype=dtype, seed=2)
    slots = torch.tensor([9, 0, 23, 10])
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    for token, slot in enumerate(slots.tolist()):
        expected_k[slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = k[token]
        expected_v[slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = v[token]
    strided_v = torch.cat((v, v), dim=1)[:, :3]
    write_kv(k, strided_v, k_cache, v_cache, slots)
    assert torch.equal(k_cache, expected_k)
    assert torch.equal(v_cache, expected_v)


def test_page_rows_place_a_token_and_head_in_the_flat_cache() -> None:
    cache = torch.arange(3 * 2 * BLOCK_SIZE).view(3, 2, BLOCK_SIZE)
    rows = page_rows(torch.tensor([5, 8]), 2, BLOCK_SIZE)
    assert cache.flatten()[rows].tolist() == [int(cache[b, h, o]) for b, o in ((1, 1), (2, 0)) for h in (0, 1)]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_write_latent_fills_its_slots_and_leaves_all_others_bit_for_bit(dtype: torch.dtype) -> None:
    cache, latents = random_tensor(6, 1, BLOCK_SIZE, 5, dtype=dtype), random_tensor(3, 5, dtype=dtype, seed=1)
    slots = [9, 0, 23]
    expected = cache.clone()
    for latent, slot in zip(latents, slots, strict=True):
        expected[slot // BLOCK_SIZE, 0, slot % BLOCK_SIZE] = latent
    write_latent(latents, cache, torch.tensor(slots))
    assert torch.equal(cache, expected)
