"""Linear layers give the same numbers packed for oneDNN or plain, with and without what is fused into them."""

from __future__ import annotations

import pytest
import torch

from rayllm.linear import DenseLinear, PackedLinear, WidenedLinear, dense_linear, widened
from rayllm_kernels.activation import ACTIVATIONS
from rayllm_kernels.device import interpreted

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def _random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 3, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_equal_float64(
    dtype: torch.dtype, num_tokens: int, biased: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed:
        monkeypatch.setattr(PackedLinear, "supports", lambda weight: False)
    x, weight, other = (
        _random(*shape, dtype=dtype, seed=seed)
        for seed, shape in enumerate(((num_tokens, 37), (19, 37), (num_tokens, 19)))
    )
    bias = _random(19, dtype=dtype, seed=3) if biased else None
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
    layer = dense_linear(weight, bias)
    assert _error(layer(x), expected) < DTYPES[dtype]
    assert _error(layer.plus(x, other), expected + other.double()) < DTYPES[dtype]
    assert _error(layer.times(x, other), expected * other.double()) < DTYPES[dtype]
    for name, function in ACTIVATIONS.items():
        assert _error(layer.activated(x, name), function(expected)) < DTYPES[dtype], name


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [3, 8, 70])
def test_a_cpu_without_16_bit_instructions_rounds_float32_once(
    num_tokens: int, dtype: torch.dtype, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PackedLinear, "supports", lambda weight: False)
    monkeypatch.setattr(WidenedLinear, "supports", lambda weight: True)
    monkeypatch.setattr(widened, "_PIECE_SIZE", 16 * 37)  # pieces of 16 outputs: the last has 3
    x, weight = _random(num_tokens, 37, dtype=dtype, seed=0), _random(35, 37, dtype=dtype, seed=1)
    bias = _random(35, dtype=dtype, seed=2) if biased else None
    found = dense_linear(weight, bias)(x)
    exact = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
    if num_tokens >= 8:
        half_step = torch.finfo(dtype).eps / 2
        assert bool(((found.double() - exact).abs() <= 1.01 * half_step * exact.abs() + 1e-5).all())
    assert found.dtype == dtype
    assert _error(found, exact) < DTYPES[dtype]


def test_only_16_bit_floats_on_a_cpu_that_has_no_word_for_them_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True, raising=False)
    found = [WidenedLinear.supports(torch.ones(2, 2, dtype=dtype)) for dtype in (*DTYPES, torch.int8)]
    assert found == [False, True, False, False]
    assert not WidenedLinear.supports(torch.ones(2, 2, dtype=torch.bfloat16, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_give_no_rows(dtype: torch.dtype) -> None:
    layer = dense_linear(torch.ones(5, 3, dtype=dtype))
    assert layer(torch.ones(0, 3, dtype=dtype)).shape == (0, 5)
    assert layer.plus(torch.ones(0, 3, dtype=dtype), torch.ones(0, 5, dtype=dtype)).shape == (0, 5)


@pytest.mark.parametrize("biased", [True, False])
def test_on_a_gpu_a_plain_product_adds_itself_to_the_residual(biased: bool) -> None:
    x, weight, residual = (
        _random(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate([(3, 7), (5, 7), (3, 5)])
    )
    bias = _random(5, dtype=torch.float32, seed=3) if biased else None
    layer = DenseLinear(weight, bias)
    expected = x.double() @ weight.double().T + residual.double() + (0 if bias is None else bias.double())
    before = residual.clone()
    assert _error(layer.plus(x, residual), expected) < 1e-6
    assert torch.equal(residual, before)
    with interpreted():
        found = layer.plus(x, residual)
    assert found.data_ptr() == residual.data_ptr()
    assert _error(found, expected) < 1e-6
