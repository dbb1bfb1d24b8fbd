"""One query a line, in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from kernel_accuracy import KERNEL_TOLERANCES, Buffers, relative_error
from paged_attention import SCORINGS, SHAPES, Case, Step

from rayllm_kernels.attention import Scoring


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "reference"])
@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
def test_every_scoring_equals_float64(scoring: Scoring, kernels: bool, buffers: Buffers) -> None:
    found, expected = Step(Case(scoring=scoring), buffers).decode(buffers, kernels=kernels)
    assert relative_error(found, expected) < KERNEL_TOLERANCES[torch.float32]


@pytest.mark.kernels
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), SHAPES)
def test_every_shape_of_heads_equals_float64(
    num_heads: int, num_kv_heads: int, head_dim: int, buffers: Buffers
) -> None:
    case = Case(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, scoring=Scoring(0.1))
    found, expected = Step(case, buffers).decode(buffers)
    assert relative_error(found, expected) < KERNEL_TOLERANCES[torch.float32]


@pytest.mark.kernels
@pytest.mark.parametrize("page", [16, 48, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_are_within_their_tolerance(dtype: torch.dtype, page: int, buffers: Buffers) -> None:
    case = Case(((150, 1), (0, 0), (64, 1)), head_dim=64, page=page, dtype=dtype)
    found, expected = Step(case, buffers).decode(buffers)
    assert relative_error(found, expected) < KERNEL_TOLERANCES[dtype]


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float8_in_the_cache_is_widened_and_scaled(dtype: torch.dtype, buffers: Buffers) -> None:
    """Against what the cache holds: the rounding to float8 is not the kernel's."""
    case = Case(dtype=dtype, scoring=Scoring(0.3, k_scale=0.5, v_scale=3.0))
    found, expected = Step(case, buffers, torch.float8_e4m3fn).decode(buffers)
    assert relative_error(found, expected) < KERNEL_TOLERANCES[dtype]


def test_pages_and_heads_that_the_kernels_do_not_take_are_refused(buffers: Buffers) -> None:
    with pytest.raises(ValueError, match="block_size=24 is not a multiple of 16"):
        Step(Case(page=24), buffers).decode(buffers)
    with pytest.raises(ValueError, match="head_dim=264 is above 256"):
        Step(Case(head_dim=264), buffers).decode(buffers)
