"""Rotary embedding against complex multiplication, pair by pair."""

from __future__ import annotations

import pytest
import torch
from kernel_accuracy import TOLERANCES, random_tensor, relative_error

from rayllm_kernels.rope.reference import rope


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rotary_dim", [8, 24])
def test_rope_turns_each_pair_and_leaves_the_channels_past_the_rotary_width(
    rotary_dim: int, dtype: torch.dtype
) -> None:
    x = random_tensor(7, 3, 24, dtype=dtype)
    angles = torch.rand(7, rotary_dim // 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 6
    cos, sin = (torch.cat((f(angles),) * 2, dim=-1).to(dtype) for f in (torch.cos, torch.sin))
    expected = x.double().clone()
    half = rotary_dim // 2
    for token in range(7):
        for pair in range(half):
            turn = complex(cos[token, pair], sin[token, pair])
            for head in range(3):
                z = complex(x[token, head, pair], x[token, head, pair + half]) * turn
                expected[token, head, pair], expected[token, head, pair + half] = z.real, z.imag
    before = x.clone()
    found = rope(x, cos, sin)
    assert relative_error(found, expected) < TOLERANCES[dtype]
    assert torch.equal(found[..., rotary_dim:], x[..., rotary_dim:])
    assert torch.equal(x, before)
