from __future__ import annotations

import pytest
import torch

from rayllm.distributed.groups import TensorParallel
from rayllm.layers.mlp import Mlp
from rayllm.linear import PackedLinear
from rayllm.spec import Activation, MlpSpec
from rayllm.weights.source import DummyWeights
from rayllm_kernels.activation import ACTIVATIONS

CPU = torch.device("cpu")


def _random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_feed_forward_is_the_same_joined_and_separate(
    gated: bool, bias: bool, activation: Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = MlpSpec(24, activation, gated, bias)
    weights = DummyWeights(0, torch.float32, CPU)
    x, residual = (_random(5, 16, dtype=torch.float32, seed=seed) for seed in (1, 2))
    packed = Mlp(weights, "layers.0", spec, 16, TensorParallel()).plus(x, residual)
    monkeypatch.setattr(PackedLinear, "supports", lambda weight: False)
    plain = Mlp(weights, "layers.0", spec, 16, TensorParallel()).plus(x, residual)
    up, down = (weights.tensor(f"layers.0.{n}.weight", s) for n, s in (("up", (24, 16)), ("down", (16, 24))))
    inner = x @ up.T
    inner = (
        ACTIVATIONS[activation](x @ weights.tensor("layers.0.gate.weight", (24, 16)).T) * inner
        if gated
        else (ACTIVATIONS[activation](inner))
    )
    for found in (packed, plain):
        torch.testing.assert_close(found, inner @ down.T + residual, atol=1e-5, rtol=1e-5)
