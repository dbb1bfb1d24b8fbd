from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rayllm.linear import ExpertLinear, SeparateExperts, StackedExperts, expert_gated_linear, expert_linear
from rayllm.spec import ClampedSwiglu
from rayllm_kernels.activation import ACTIVATIONS

COUNTS = [2, 0, 3, 1]
EXPERT_OF = [0, 0, 2, 2, 2, 3]


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _parameters(num_outputs: int, bias: bool, seed: int) -> list[tuple[Tensor, Tensor | None]]:
    weights, biases = _random(4, num_outputs, 8, seed=seed), _random(4, num_outputs, seed=seed + 1)
    return [(weight, biases[i] if bias else None) for i, weight in enumerate(weights)]


def _products(x: Tensor, parameters: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    rows = []
    for row, expert in zip(x, EXPERT_OF, strict=True):
        weight, bias = parameters[expert]
        rows.append(weight @ row if bias is None else weight @ row + bias)
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [False, True])
def test_rows_are_multiplied_by_their_own_expert(bias: bool) -> None:
    x, parameters = _random(6, 8, seed=0), _parameters(5, bias, seed=1)
    expected = _products(x, parameters)
    layer = expert_linear(iter(parameters), 4)
    assert isinstance(layer, ExpertLinear)
    torch.testing.assert_close(layer(x, COUNTS), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", ClampedSwiglu(1.5, 2.0)])
def test_gates_and_ups_are_those_of_their_own_expert(activation: str | ClampedSwiglu, bias: bool) -> None:
    x, gates, ups = _random(6, 8, seed=0), _parameters(5, bias, seed=1), _parameters(5, bias, seed=3)
    gate, up = _products(x, gates), _products(x, ups)
    if isinstance(activation, ClampedSwiglu):
        gate = gate.clamp(max=2.0)
        expected = (up.clamp(-2.0, 2.0) + 1) * gate * torch.sigmoid(1.5 * gate)
    else:
        expected = ACTIVATIONS[activation](gate) * up
    layer = expert_gated_linear(iter(gates), iter(ups), 4, activation)
    assert isinstance(layer, ExpertLinear)
    torch.testing.assert_close(layer(x, COUNTS), expected, atol=1e-5, rtol=1e-5)


def test_a_cpu_has_a_layer_for_each_expert() -> None:
    assert isinstance(expert_linear(iter(_parameters(5, bias=False, seed=0)), 4), SeparateExperts)


@pytest.mark.usefixtures("interpreted_kernels")
def test_a_gpu_has_one_tensor_for_all_experts_gates_before_ups() -> None:
    gates, ups = _parameters(5, bias=True, seed=1), _parameters(5, bias=True, seed=3)
    stacked = expert_linear(iter(gates), 4)
    assert isinstance(stacked, StackedExperts)
    assert torch.equal(stacked.weight_EOI, torch.stack([weight for weight, _ in gates]))
    joined = expert_gated_linear(iter(gates), iter(ups), 4, "silu")
    assert isinstance(joined, StackedExperts)
    assert joined.bias_EO is not None
    for expert, ((gate, gate_bias), (up, up_bias)) in enumerate(zip(gates, ups, strict=True)):
        assert gate_bias is not None
        assert up_bias is not None
        assert torch.equal(joined.weight_EOI[expert], torch.cat((gate, up)))
        assert torch.equal(joined.bias_EO[expert], torch.cat((gate_bias, up_bias)))


def test_a_rank_whose_experts_nobody_takes_gives_no_rows() -> None:
    layer = expert_linear(iter(_parameters(5, bias=False, seed=0)), 4)
    assert isinstance(layer, ExpertLinear)
    assert layer(torch.empty(0, 8), [0, 0, 0, 0]).shape == (0, 5)
