from __future__ import annotations

import pytest
import torch

from rayllm.linear.dense import DenseLinear
from rayllm.linear.gated import JoinedGatedLinear, SeparateGatedLinear, gated_linear
from rayllm.linear.packed import PackedLinear
from rayllm_kernels.activation import ACTIVATIONS


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [True, False])
def test_joined_and_separate_products_give_the_gated_product(activation: str, biased: bool) -> None:
    x, gate, up = _random(5, 16, seed=0), _random(24, 16, seed=1), _random(24, 16, seed=2)
    gate_bias, up_bias = (_random(24, seed=3), _random(24, seed=4)) if biased else (None, None)
    gate_part, up_part = DenseLinear(gate, gate_bias), DenseLinear(up, up_bias)
    expected = ACTIVATIONS[activation](gate_part(x)) * up_part(x)
    joined_bias = torch.cat((gate_bias, up_bias)) if gate_bias is not None and up_bias is not None else None
    joined = JoinedGatedLinear(DenseLinear(torch.cat((gate, up)), joined_bias), activation)
    for found in (joined, SeparateGatedLinear(gate_part, up_part, activation)):
        assert torch.allclose(found(x), expected, atol=1e-5)


def test_products_are_joined_where_a_linear_fuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedLinear, "supports", lambda weight: False)
    found = gated_linear((_random(24, 16, seed=1), None), (_random(24, 16, seed=2), None), "silu")
    assert isinstance(found, JoinedGatedLinear)
