from __future__ import annotations

import pytest
import torch

from rayllm.layers.norm import NORMS, LayerNorm, RMSNorm
from rayllm.spec import NormSpec
from rayllm.weights.source import DummyWeights

X = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))


def _weights(dtype: torch.dtype = torch.float32) -> DummyWeights:
    return DummyWeights(0, dtype, torch.device("cpu"))


def test_rms_norm_has_no_mean_and_no_bias() -> None:
    norm = RMSNorm(_weights(), "norm", 24, NormSpec("rms", 1e-5))
    expected = X / (X.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    assert torch.allclose(norm(X), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_centered_weight_is_added_to_one_and_multiplied_in_float32(dtype: torch.dtype) -> None:
    norm = RMSNorm(_weights(dtype), "norm", 24, NormSpec("rms", 1e-5, zero_centered=True))
    assert norm.weight.dtype == torch.float32
    assert torch.equal(norm.weight, torch.full((24,), 2.0))
    wide = X.to(dtype).float()
    expected = (wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight).to(dtype)
    found = norm(X.to(dtype))
    assert found.dtype == dtype
    assert torch.allclose(found, expected, atol=1e-6, rtol=0 if dtype == torch.float32 else 2**-7)


def test_layer_norm_is_torchs() -> None:
    norm = LayerNorm(_weights(), "norm", 24, NormSpec("layer", 1e-3))
    expected = torch.nn.functional.layer_norm(X, (24,), norm.weight, norm.bias, 1e-3)
    assert torch.allclose(norm(X), expected, atol=1e-6)


@pytest.mark.parametrize(("kind", "parameters"), [("rms", {"weight"}), ("layer", {"weight", "bias"})])
def test_a_spec_names_its_norm(kind: str, parameters: set[str]) -> None:
    spec = NormSpec(kind, 1e-5)  # type: ignore[arg-type]
    assert set(vars(NORMS[kind](_weights(), "norm", 24, spec))) - {"eps"} == parameters
