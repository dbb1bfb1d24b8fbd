"""Normalisation against float64, in odd shapes and both dtypes."""

from __future__ import annotations

import pytest
import torch
from kernel_accuracy import TOLERANCES, random_tensor, relative_error

from rayllm_kernels.norm.reference import add_rms_norm, layer_norm, rms_norm


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 65), (5, 7, 24)])
def test_rms_norm_divides_by_the_root_mean_square(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = random_tensor(*shape, dtype=dtype), random_tensor(shape[-1], dtype=dtype, seed=1)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert relative_error(rms_norm(x, weight, 1e-5), expected) < TOLERANCES[dtype]


def test_rms_norm_takes_a_weight_for_each_head() -> None:
    x, weight = random_tensor(5, 3, 8), random_tensor(3, 8, seed=1)
    each = [rms_norm(x[:, head], weight[head], 1e-5) for head in range(3)]
    assert relative_error(rms_norm(x, weight, 1e-5), torch.stack(each, dim=1).double()) < 1e-6


@pytest.mark.parametrize("per_head", [False, True])
def test_a_float32_weight_is_multiplied_before_the_only_rounding(per_head: bool) -> None:
    x, weight = random_tensor(5, 3, 24, dtype=torch.bfloat16), random_tensor(3, 24, seed=1)
    weight = weight if per_head else weight[0]
    expected = rms_norm(x.float(), weight, 1e-5).to(torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, 1e-5), expected)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_add_rms_norm_returns_the_sum_as_the_next_residual(dtype: torch.dtype) -> None:
    x, residual, weight = (random_tensor(3, 33, dtype=dtype, seed=i) for i in range(3))
    wide = x.double() + residual.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight[0].double()
    normed, total = add_rms_norm(x, residual, weight[0], 1e-6)
    assert total.data_ptr() == residual.data_ptr()
    assert relative_error(total, wide) < TOLERANCES[dtype]
    assert relative_error(normed, expected) < 2 * TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm_centres_and_scales(biased: bool, dtype: torch.dtype) -> None:
    x, weight, bias = (random_tensor(5, 37, dtype=dtype, seed=i) for i in range(3))
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight[0].double()
    if biased:
        expected = expected + bias[0].double()
    assert relative_error(layer_norm(x, weight[0], bias[0] if biased else None, 1e-5), expected) < TOLERANCES[dtype]
