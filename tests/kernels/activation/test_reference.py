"""Activations against their definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_accuracy import TOLERANCES, random_tensor, relative_error

from rayllm_kernels.activation.reference import ACTIVATIONS, clamped_swiglu, silu_mul


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_silu_mul_gates_the_right_half_by_the_left(dtype: torch.dtype) -> None:
    x = random_tensor(3, 2 * 13, dtype=dtype)
    gate, up = x.double().chunk(2, dim=-1)
    assert relative_error(silu_mul(x), gate * torch.sigmoid(gate) * up) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_clamped_swiglu_follows_its_definition(dtype: torch.dtype) -> None:
    x = 4 * random_tensor(5, 2 * 13, dtype=dtype)
    gate, up = x.double().chunk(2, dim=-1)
    assert (gate.max() > 3, gate.min() < -3, up.max() > 3, up.min() < -3) == (True,) * 4
    gate, up = gate.clamp(max=3.0), up.clamp(-3.0, 3.0)
    expected = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    assert relative_error(clamped_swiglu(x, 1.702, 3.0), expected) < 2 * TOLERANCES[dtype]


def test_activations_follow_their_definitions() -> None:
    x = random_tensor(3, 17)
    wide = x.double()
    expected = {
        "silu": wide * torch.sigmoid(wide),
        "relu": wide.clamp(min=0),
        "gelu": wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2))),
        "gelu_tanh": wide * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))),
    }
    assert ACTIVATIONS.keys() == expected.keys()
    for name, values in expected.items():
        assert relative_error(ACTIVATIONS[name](x), values) < 1e-6, name
