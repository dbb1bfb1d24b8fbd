from __future__ import annotations

import torch

from rayllm_kernels.moe.triton.tiles import num_tiles, tile_of_products


def test_there_are_tiles_enough_for_every_way_to_choose() -> None:
    tokens = 4
    for num_choices in range(1, 12):
        for counts in _partitions(num_choices, 3):
            needed = sum(-(-count // tokens) for count in counts)
            assert needed <= num_tiles(num_choices, 3, tokens)
        worst = max(sum(-(-count // tokens) for count in counts) for counts in _partitions(num_choices, 3))
        assert worst == num_tiles(num_choices, 3, tokens)


def _partitions(total: int, parts: int) -> list[tuple[int, ...]]:
    if parts == 1:
        return [(total,)]
    return [(first, *rest) for first in range(total + 1) for rest in _partitions(total - first, parts - 1)]


def test_programs_have_as_many_tokens_as_an_expert_has_on_average() -> None:
    tokens = [tile_of_products(8 * num_tokens, 128, torch.bfloat16).tokens for num_tokens in (1, 256, 512, 1024, 8192)]
    assert tokens == [16, 16, 32, 64, 128]
