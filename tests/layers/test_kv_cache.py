"""Layers' caches may differ in shape, or be none; blocks are cleared in all of them."""

from __future__ import annotations

import torch

from rayllm.layers.kv_cache import KVPool, KVSpec

CPU = torch.device("cpu")
GROUPED, LATENT, NONE = KVSpec(2, (16, 16)), KVSpec(1, (72,)), KVSpec(4, ())


def test_each_layer_has_the_tensors_of_its_own_spec() -> None:
    pool = KVPool([GROUPED, LATENT, NONE, GROUPED], 5, 4, torch.float32, CPU)
    assert [[tuple(cache.shape) for cache in layer] for layer in pool.layers] == [
        [(5, 2, 4, 16)] * 2,
        [(5, 1, 4, 72)],
        [],
        [(5, 2, 4, 16)] * 2,
    ]


def test_no_two_layers_share_memory() -> None:
    pool = KVPool([GROUPED, GROUPED, LATENT], 3, 4, torch.float32, CPU)
    caches = [cache for layer in pool.layers for cache in layer]
    for value, cache in enumerate(caches):
        cache.fill_(value)
    assert [bool((cache == value).all()) for value, cache in enumerate(caches)] == [True] * 5


def test_clearing_zeroes_the_blocks_in_every_layer_and_no_other() -> None:
    pool = KVPool([GROUPED, LATENT], 4, 4, torch.float32, CPU)
    caches = [cache for layer in pool.layers for cache in layer]
    for cache in caches:
        cache.fill_(torch.nan)
    pool.clear([1, 3])
    for cache in caches:
        assert [bool((block == 0).all()) for block in cache] == [False, True, False, True]


def test_bytes_of_a_token_follow_from_heads_widths_and_dtype() -> None:
    assert [spec.bytes_per_token(torch.bfloat16) for spec in (GROUPED, LATENT, NONE)] == [128, 144, 0]


def test_a_model_without_a_cache_has_an_empty_pool() -> None:
    pool = KVPool([NONE, NONE], 3, 4, torch.float32, CPU)
    pool.clear([0])
    assert pool.layers == [(), ()]


def test_clearing_all_zeroes_every_block_in_every_layer() -> None:
    pool = KVPool([GROUPED, LATENT], 3, 4, torch.float32, CPU)
    caches = [cache for layer in pool.layers for cache in layer]
    for cache in caches:
        cache.fill_(torch.nan)
    pool.clear_all()
    assert all(bool((cache == 0).all()) for cache in caches)
