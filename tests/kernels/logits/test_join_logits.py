"""Logits of the whole vocabulary from the ranks' parts, by both implementations."""

from __future__ import annotations

import pytest
import torch
from kernel_accuracy import KERNEL_TOLERANCES, Buffers, random_tensor, relative_error

from rayllm_kernels.logits import reference, triton


@pytest.mark.parametrize("implementation", [reference, triton])
@pytest.mark.parametrize("dtype", KERNEL_TOLERANCES)
@pytest.mark.parametrize(("scale", "soft_cap"), [(1.0, None), (0.3, None), (1.0, 2.0), (-0.3, 0.5)])
@pytest.mark.parametrize(("num_parts", "vocab_size"), [(1, 13), (3, 37), (2, 25)])
def test_parts_stand_side_by_side_without_what_pads_the_last(
    implementation, num_parts: int, vocab_size: int, scale: float, soft_cap: float | None, dtype, buffers: Buffers
) -> None:
    parts = buffers.input(random_tensor(num_parts, 3, 13, dtype=dtype))
    expected = torch.cat(parts.double().unbind(), dim=-1)[:, :vocab_size] * scale
    if soft_cap is not None:
        expected = soft_cap * (expected / soft_cap).tanh()
    found = implementation.join_logits(parts, vocab_size, scale, soft_cap)
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 1e-6


def test_nan_stays_visible_and_infinity_is_capped() -> None:
    parts = torch.tensor([[[torch.nan, torch.inf, -torch.inf, 0.0]]])
    for implementation in (reference, triton):
        found = implementation.join_logits(parts.clone(), 4, 1.0, 5.0)[0]
        assert found[0].isnan()
        assert found[1:].tolist() == [5.0, -5.0, 0.0]
