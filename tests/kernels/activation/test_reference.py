"""Activations against their definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_accuracy import TOLERANCES, random_tensor, relative_error

from rayllm_kernels.activation.reference import ACTIVATIONS, silu_mul


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_silu_mul_gates_the_right_half_by_the_left(dtype: torch.dtype) -> None:
    x = random_tensor(3, 2 * 13, dtype=dtype)
    gate, up = x.double().chunk(2, dim=-1)
    assert relative_error(silu_mul(x), gate * torch.sigmoid(gate) * up) < TOLERANCES[dtype]


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
