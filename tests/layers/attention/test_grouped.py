from __future__ import annotations

import pytest

from rayllm.layers.attention.grouped import GroupedAttention, kv_heads_of
from rayllm.spec import GroupedAttentionSpec


@pytest.mark.parametrize(
    ("num_kv_heads", "expected"),
    [(8, [range(2), range(2, 4), range(4, 6), range(6, 8)]), (2, [range(1), range(1), range(1, 2), range(1, 2)])],
)  # fmt: skip
def test_ranks_share_key_value_heads_or_hold_the_same_one(num_kv_heads: int, expected: list[range]) -> None:
    assert [kv_heads_of(num_kv_heads, rank, 4) for rank in range(4)] == expected


def test_a_rank_keeps_its_share_of_keys_and_values() -> None:
    spec = GroupedAttentionSpec(num_heads=8, num_kv_heads=2, head_dim=16, scale=0.25)
    assert [spec.kv_shape(size) for size in (1, 2, 4)] == [
        (2, (16, 16)), (1, (16, 16)), (1, (16, 16)),
    ]  # fmt: skip


def test_a_group_has_the_slopes_of_its_own_heads_and_no_others() -> None:
    spec = GroupedAttentionSpec(4, 2, 16, 0.25, window=9, alibi_slopes=(0.5, 0.25, 0.125, 0.0625))
    first, second = (GroupedAttention.group(spec, rank, 2) for rank in range(2))
    assert (first.alibi_slopes, second.alibi_slopes) == ((0.5, 0.25), (0.125, 0.0625))
    assert first.window == second.window == 9
