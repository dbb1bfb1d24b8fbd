"""The writes' kernels: their slots hold what was given, all others are bit for bit as they were."""

from __future__ import annotations

import pytest
import torch
from kernel_accuracy import KERNEL_TOLERANCES, Buffers, random_tensor

from rayllm_kernels.kv_cache import reference
from rayllm_kernels.kv_cache.triton import write_kv, write_latent

BLOCK_SIZE = 4
SLOTS = (9, -1, 0, 23, -1)


@pytest.mark.parametrize("dtype", KERNEL_TOLERANCES)
def test_write_kv_fills_its_slots_and_no_others(dtype: torch.dtype, buffers: Buffers) -> None:
    cache = random_tensor(6, 3, BLOCK_SIZE, 5, dtype=dtype)
    k_cache, v_cache = buffers.inout(cache), buffers.inout(cache + 1)
    k = random_tensor(3, len(SLOTS), 5, dtype=dtype, seed=1).transpose(0, 1)
    v = random_tensor(len(SLOTS), 7, 5, dtype=dtype, seed=2)[:, 2:5]
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    for token, slot in enumerate(SLOTS):
        if slot >= 0:
            expected_k[slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = k[token]
            expected_v[slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = v[token]
    write_kv(k, v, k_cache, v_cache, torch.tensor(SLOTS))
    assert torch.equal(k_cache, expected_k)
    assert torch.equal(v_cache, expected_v)


def test_more_heads_than_a_program_holds_are_written(buffers: Buffers) -> None:
    k_cache, v_cache = (buffers.output(2, 11, BLOCK_SIZE, 200) for _ in range(2))
    k, v = random_tensor(1, 11, 200), random_tensor(1, 11, 200, seed=1)
    write_kv(k, v, k_cache, v_cache, torch.tensor([6]))
    assert torch.equal(k_cache[1, :, 2], k[0])
    assert torch.equal(v_cache[1, :, 2], v[0])
    assert int(k_cache.isfinite().sum()) == k.numel()


@pytest.mark.parametrize("dtype", KERNEL_TOLERANCES)
def test_write_latent_fills_its_slots_and_no_others(dtype: torch.dtype, buffers: Buffers) -> None:
    cache = buffers.inout(random_tensor(6, 1, BLOCK_SIZE, 9, dtype=dtype))
    latents = random_tensor(len(SLOTS), 12, dtype=dtype, seed=1)[:, 3:]
    expected = cache.clone()
    for token, slot in enumerate(SLOTS):
        if slot >= 0:
            expected[slot // BLOCK_SIZE, 0, slot % BLOCK_SIZE] = latents[token]
    write_latent(latents, cache, torch.tensor(SLOTS))
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_caches_of_8_bits_hold_the_quotient_by_the_scale_and_saturate(dtype: torch.dtype) -> None:
    k, v = 20 * random_tensor(2, 3, 5, dtype=dtype), random_tensor(2, 3, 5, dtype=dtype, seed=1)
    k[0, 0, 0], k[0, 0, 1], v[1, 1, 1] = 1e4, -1e4, torch.nan
    slots = torch.tensor([9, 2])
    caches = [torch.zeros(3, 3, BLOCK_SIZE, 5).to(torch.float8_e4m3fn) for _ in range(4)]
    write_kv(k, v, *caches[:2], slots, None, 0.5, 0.25)
    reference.write_kv(k, v, *caches[2:], slots, None, 0.5, 0.25)
    for found, expected in zip(caches[:2], caches[2:], strict=True):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    assert caches[0].float()[2, 0, 1, :2].tolist() == [448.0, -448.0]
    latent_caches = [torch.zeros(3, 1, BLOCK_SIZE, 5).to(torch.float8_e4m3fn) for _ in range(2)]
    write_latent(k[:, 0], latent_caches[0], slots, 0.5)
    reference.write_latent(k[:, 0], latent_caches[1], slots, 0.5)
    assert torch.equal(*(cache.view(torch.uint8) for cache in latent_caches))
