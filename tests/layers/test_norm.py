from __future__ import annotations

import pytest
import torch

from rayllm.layers.norm import NORMS, LayerNorm, RMSNorm
from rayllm.weights.source import DummyWeights

X = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))


def _weights() -> DummyWeights:
    return DummyWeights(0, torch.float32, torch.device("cpu"))


def test_rms_norm_has_no_mean_and_no_bias() -> None:
    norm = RMSNorm(_weights(), "norm", 24, 1e-5)
    expected = X / (X.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    assert torch.allclose(norm(X), expected, atol=1e-6)


def test_layer_norm_is_torchs() -> None:
    norm = LayerNorm(_weights(), "norm", 24, 1e-3)
    expected = torch.nn.functional.layer_norm(X, (24,), norm.weight, norm.bias, 1e-3)
    assert torch.allclose(norm(X), expected, atol=1e-6)


@pytest.mark.parametrize(("kind", "parameters"), [("rms", {"weight"}), ("layer", {"weight", "bias"})])
def test_a_spec_names_its_norm(kind: str, parameters: set[str]) -> None:
    assert set(vars(NORMS[kind](_weights(), "norm", 24, 1e-5))) - {"eps"} == parameters
