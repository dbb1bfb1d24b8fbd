"""The gated activations' kernel against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from kernel_accuracy import KERNEL_TOLERANCES, Buffers, random_tensor, relative_error
from torch import Tensor

from rayllm_kernels.activation.triton import clamped_swiglu, gelu_mul, gelu_tanh_mul, relu_mul, silu_mul


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=3.0), up.clamp(-3.0, 3.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def _gelu_tanh(gate: Tensor) -> Tensor:
    return gate * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))


CASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (silu_mul, lambda gate, up: gate * torch.sigmoid(gate) * up),
    "relu": (relu_mul, lambda gate, up: gate.clamp(min=0) * up),
    "gelu": (gelu_mul, lambda gate, up: gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up),
    "gelu_tanh": (gelu_tanh_mul, lambda gate, up: _gelu_tanh(gate) * up),
    "clamped_swiglu": (partial(clamped_swiglu, alpha=1.702, limit=3.0), _swiglu),
}


@pytest.mark.parametrize("dtype", KERNEL_TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_the_left_half_gates_the_right_one(name: str, dtype: torch.dtype, buffers: Buffers) -> None:
    kernel, definition = CASES[name]
    x = buffers.input(2 * random_tensor(3, 2 * 13, dtype=dtype))
    found = kernel(x)
    assert found.is_contiguous()
    assert relative_error(found, definition(*x.double().chunk(2, dim=-1))) < KERNEL_TOLERANCES[dtype]


def test_a_width_of_several_programs_is_covered(buffers: Buffers) -> None:
    x = buffers.input(random_tensor(2, 2 * 1027))
    gate, up = x.double().chunk(2, dim=-1)
    assert relative_error(silu_mul(x), gate * torch.sigmoid(gate) * up) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_nan_and_large_numbers_stay_what_they_are(name: str) -> None:
    kernel, definition = CASES[name]
    x = torch.tensor([[math.nan, 1.0, 40.0, -40.0, 1.0, math.nan, 2.0, 2.0]])
    expected = definition(*x.double().chunk(2, dim=-1))
    torch.testing.assert_close(kernel(x).double(), expected, equal_nan=True, rtol=1e-6, atol=1e-12)
