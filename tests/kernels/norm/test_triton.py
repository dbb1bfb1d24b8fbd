"""The norms' kernels against float64, in odd shapes and all dtypes."""

from __future__ import annotations

import pytest
import torch
from kernel_accuracy import KERNEL_TOLERANCES, Buffers, random_tensor, relative_error
from torch import Tensor

from rayllm_kernels.norm import reference
from rayllm_kernels.norm.triton import add_rms_norm, layer_norm, rms_norm, rms_norm_add

EPS = 1e-5


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", KERNEL_TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 65), (2, 1030), (5, 7, 24)])
def test_rms_norm_divides_by_the_root_mean_square(shape: tuple[int, ...], dtype: torch.dtype, buffers: Buffers) -> None:
    x = buffers.input(3 * random_tensor(*shape, dtype=dtype))
    weight = buffers.input(random_tensor(shape[-1], dtype=dtype, seed=1))
    found = rms_norm(x, weight, EPS)
    assert found.is_contiguous()
    assert relative_error(found, _normed(x.double(), weight)) < KERNEL_TOLERANCES[dtype]


def test_rms_norm_takes_a_weight_for_each_head_in_float32(buffers: Buffers) -> None:
    x = buffers.input(random_tensor(5, 3, 24, dtype=torch.bfloat16))
    weight = buffers.input(random_tensor(3, 24, seed=1))
    assert relative_error(rms_norm(x, weight, EPS), _normed(x.double(), weight)) < 4e-3


def test_rms_norm_reads_rows_that_stand_apart(buffers: Buffers) -> None:
    whole, weight = buffers.input(random_tensor(4, 40)), buffers.input(random_tensor(24, seed=1))
    part, heads = whole[:, 8:32], whole.view(4, 5, 8)[:, 1:4]
    assert relative_error(rms_norm(part, weight, EPS), _normed(part.double(), weight)) < 1e-6
    assert relative_error(rms_norm(heads, weight[:8], EPS), _normed(heads.double(), weight[:8])) < 1e-6


@pytest.mark.parametrize("dtype", KERNEL_TOLERANCES)
def test_add_rms_norm_writes_the_sum_to_the_residual(dtype: torch.dtype, buffers: Buffers) -> None:
    x, values, weight = (random_tensor(3, 33, dtype=dtype, seed=i) for i in range(3))
    residual, weight = buffers.inout(values), weight[0]
    wide = x.double() + values.double()
    normed, total = add_rms_norm(buffers.input(x), residual, weight, EPS)
    assert total.data_ptr() == residual.data_ptr()
    assert relative_error(total, wide) < KERNEL_TOLERANCES[dtype]
    assert relative_error(normed, _normed(total.double(), weight)) < KERNEL_TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", KERNEL_TOLERANCES)
@pytest.mark.parametrize("width", [33, 1030])
def test_rms_norm_add_adds_what_is_normed_to_the_residual(width: int, dtype: torch.dtype, buffers: Buffers) -> None:
    x, values, weights = (random_tensor(3, width, dtype=dtype, seed=i) for i in range(3))
    residual, weight = buffers.inout(values), weights[0]
    found = rms_norm_add(buffers.input(x), residual, weight, EPS)
    assert found.data_ptr() == residual.data_ptr()
    assert relative_error(found, values.double() + _normed(x.double(), weight)) < KERNEL_TOLERANCES[dtype]
    reference.rms_norm_add(x, values, weight, EPS)
    assert relative_error(found, values.double()) < KERNEL_TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", KERNEL_TOLERANCES)
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm_centres_and_scales(biased: bool, dtype: torch.dtype, buffers: Buffers) -> None:
    x = buffers.input(random_tensor(5, 37, dtype=dtype) + 2)
    weight, bias = (buffers.input(random_tensor(37, dtype=dtype, seed=i)) for i in (1, 2))
    centred = x.double() - x.double().mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    if biased:
        expected = expected + bias.double()
    assert relative_error(layer_norm(x, weight, bias if biased else None, EPS), expected) < KERNEL_TOLERANCES[dtype]


def test_a_row_of_nan_stays_one_and_spoils_no_other() -> None:
    x = random_tensor(4, 24)
    x[1, 3] = torch.nan
    found = rms_norm(x, torch.ones(24), EPS)
    assert found[1].isnan().all()
    assert found[[0, 2, 3]].isfinite().all()
