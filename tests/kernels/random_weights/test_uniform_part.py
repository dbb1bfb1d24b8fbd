"""Parts of random tensors, by both implementations."""

from __future__ import annotations

import pytest
import torch
from kernel_accuracy import Buffers

from rayllm_kernels.random_weights import reference, triton

SHAPE = (3, 10, 7)
SEED = 0x1234_5678_9ABC_DEF0


@pytest.mark.parametrize("implementation", [reference, triton])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_part_is_cut_out_of_the_whole_with_zeros_past_its_end(implementation, dim: int, buffers: Buffers) -> None:
    whole = implementation.uniform_part(torch.empty(SHAPE), SHAPE, dim, range(SHAPE[dim]), SEED, 0.5)
    assert bool((whole.abs() <= 0.5).all())
    assert len(whole.unique()) == whole.numel()
    for part in (range(1, 3), range(2, 12), range(20, 22)):
        shape = [*SHAPE[:dim], len(part), *SHAPE[dim + 1 :]]
        found = implementation.uniform_part(buffers.output(*shape), SHAPE, dim, part, SEED, 0.5)
        expected = torch.zeros(shape)
        inside = range(part.start, min(part.stop, SHAPE[dim]))
        if inside:
            expected.narrow(dim, 0, len(inside)).copy_(whole.narrow(dim, inside.start, len(inside)))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_draw_the_same_bits(dtype: torch.dtype) -> None:
    shape, bound = (40, 33), 3**0.5
    found, expected = (
        each.uniform_part(torch.empty(shape, dtype=dtype), shape, 0, range(40), SEED, bound)
        for each in (triton, reference)
    )
    assert torch.equal(found, expected)


def test_numbers_have_the_mean_and_the_variance_that_they_should() -> None:
    drawn = reference.uniform_part(torch.empty(400, 250), (400, 250), 0, range(400), 5, 3**0.5)
    other = reference.uniform_part(torch.empty(400, 250), (400, 250), 0, range(400), 6, 3**0.5)
    assert abs(float(drawn.mean())) < 0.01
    assert float(drawn.var()) == pytest.approx(1, abs=0.01)
    assert abs(float((drawn * other).mean())) < 0.01
