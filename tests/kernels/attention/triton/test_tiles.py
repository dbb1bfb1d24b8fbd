"""Sizes of tiles."""

from __future__ import annotations

import torch

from rayllm_kernels.attention.triton.tiles import decode_tiles, device_shape, padded, prefill_tiles


def test_a_tile_is_no_longer_than_a_page_and_does_not_cross_one() -> None:
    tiles = prefill_tiles(128, torch.bfloat16, torch.bfloat16, False, 9)
    assert [tiles.for_pages(page).keys for page in (16, 48, 64, 96, 256)] == [16, 16, 64, 32, 64]


def test_later_generations_have_the_newest_known_sizes_and_odd_widths_those_of_the_next_power() -> None:
    bf16 = torch.bfloat16
    assert decode_tiles(80, bf16, bf16, 12) == decode_tiles(128, bf16, bf16, 9)
    assert decode_tiles(24, bf16, bf16, 7) == decode_tiles(64, bf16, bf16, 8)
    assert [padded(size) for size in (1, 16, 17, 96, 256)] == [16, 16, 32, 128, 256]


def test_without_a_gpu_an_h100_is_assumed() -> None:
    assert device_shape(torch.device("cpu")) == (9, 132)
