"""The one place that starts kernels, and the choice of an implementation."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from rayllm_kernels.device import interpreted, uses_triton
from rayllm_kernels.launch import launch, observed


@triton.jit
def _double_kernel(x_ptr, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(x_ptr + at, 2 * tl.load(x_ptr + at, mask=at < n), mask=at < n)


def test_a_kernel_is_launched_and_an_empty_grid_is_not() -> None:
    x = torch.arange(5.0)
    launch(_double_kernel, (2,), x, 5, SIZE=4)
    launch(_double_kernel, (0,), x, 5, SIZE=4)
    assert x.tolist() == [0, 2, 4, 6, 8]


def test_an_observer_is_given_launches_in_place_of_the_device() -> None:
    seen: list[Any] = []
    x = torch.ones(3)
    with observed(lambda kernel, grid, args, constants: seen.append((kernel, grid, args[1], constants))):
        launch(_double_kernel, (1,), x, 3, SIZE=4)
    assert seen == [(_double_kernel, (1,), 3, {"SIZE": 4})]
    assert x.tolist() == [1, 1, 1]


def test_the_reference_computes_on_a_cpu_unless_kernels_are_interpreted() -> None:
    x = torch.ones(1)
    assert not uses_triton(x)
    with interpreted():
        assert uses_triton(x)
    assert not uses_triton(x)
