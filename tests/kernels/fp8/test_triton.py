"""Quantization and products of eight bits against their definitions in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from kernel_accuracy import KERNEL_TOLERANCES, Buffers, random_tensor, relative_error
from torch import Tensor

from rayllm_kernels.fp8 import Fp8Weight, fp8_weight, reference
from rayllm_kernels.fp8.triton import fp8_linear, quantize

SHAPES = {
    "one token": (1, 128, 64, (1, 1)),
    "outputs": (3, 200, 72, (72, 1)),
    "blocks": (5, 200, 136, (2, 2)),
    "parts": (2, 1100, 136, (2, 9)),
    "more tokens than a program's": (130, 160, 136, (136, 1)),
}
"""(tokens, inputs, outputs, shape of the scales)."""


def _weight(num_inputs: int, num_outputs: int, scales: tuple[int, int], input_scale: float | None = None) -> Fp8Weight:
    values = random_tensor(num_outputs, num_inputs, dtype=torch.float32, seed=1).to(torch.float8_e4m3fn)
    fixed = None if input_scale is None else torch.tensor(input_scale)
    return fp8_weight(values, random_tensor(*scales, seed=2).abs() + 0.5, fixed)


def _expected(x: Tensor, weight: Fp8Weight) -> Tensor:
    """One scale at a time."""
    num_outputs, num_inputs = weight.values_OI.shape
    wide = weight.values_OI.double()
    size = 128 if weight.has_blocks else num_inputs
    out = torch.zeros(len(x), num_outputs, dtype=torch.float64)
    for group, begin in enumerate(range(0, num_inputs, size)):
        part = slice(begin, begin + size)
        largest = x[:, part].abs().amax(1, keepdim=True).float()
        scales = largest / 448 if weight.input_scale is None else weight.input_scale.expand_as(largest)
        rounded = (x[:, part].float() / scales).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scales.double()
        products = rounded @ wide[:, part].T
        of_outputs = weight.scales[:, group].double()
        of_outputs = of_outputs.repeat_interleave(128)[:num_outputs] if weight.has_blocks else of_outputs
        out += products * of_outputs
    return out


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", KERNEL_TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_rounded_activations(shape: str, dtype: torch.dtype, buffers: Buffers) -> None:
    num_tokens, num_inputs, num_outputs, scales = SHAPES[shape]
    weight = _weight(num_inputs, num_outputs, scales)
    names = ("values_OI", "scales", "arrivals")  # the last is zeros before and after
    weight = replace(weight, **{name: buffers.input(getattr(weight, name)) for name in names})
    x = buffers.input(random_tensor(num_tokens, num_inputs, dtype=dtype))
    bias = buffers.input(random_tensor(num_outputs, dtype=dtype, seed=3)) if num_tokens % 2 else None
    expected = _expected(x, weight)
    if bias is not None:
        expected += bias.double()
    for product in (fp8_linear, reference.fp8_linear):
        found = product(x, weight, bias)
        assert found.dtype == dtype
        assert relative_error(found, expected) < KERNEL_TOLERANCES[dtype]


def test_a_fixed_scale_limits_what_is_too_large_for_it() -> None:
    weight = _weight(128, 16, (1, 1), input_scale=0.004)
    x = random_tensor(3, 128, dtype=torch.bfloat16)
    assert (x.abs() > 0.004 * 448).any()
    for product in (fp8_linear, reference.fp8_linear):
        assert relative_error(product(x, weight), _expected(x, weight)) < KERNEL_TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize(("num_inputs", "group_size"), [(300, 128), (128, 128), (37, 37), (4100, 4100)])
def test_a_group_is_rounded_by_its_largest_value(num_inputs: int, group_size: int, buffers: Buffers) -> None:
    x = buffers.input(random_tensor(3, num_inputs, dtype=torch.bfloat16))
    values, scales = quantize(x, group_size)
    expected, expected_scales = reference.quantize(x, group_size)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(values.float(), expected.float())
    assert values.float().abs().amax(1).tolist() == [448.0] * 3


def test_zeros_stay_zeros_and_nan_is_seen() -> None:
    x = torch.zeros(2, 40)
    x[1, 3] = math.nan
    for function in (quantize, reference.quantize):
        values, scales = function(x, 40)
        assert values[0].float().tolist() == [0.0] * 40
        assert scales[0, 0] > 0
        assert values[1, 3].float().isnan() or scales[1, 0].isnan()


def test_a_token_gets_the_same_bits_whatever_others_are_in_the_step() -> None:
    weight = _weight(1100, 16, (1, 9))
    x = random_tensor(3, 1100, dtype=torch.bfloat16)
    assert torch.equal(fp8_linear(x[1:2], weight), fp8_linear(x, weight)[1:2])


def test_no_token_gives_no_row() -> None:
    assert fp8_linear(torch.empty(0, 64), _weight(64, 8, (1, 1))).shape == (0, 8)


def test_another_number_of_inputs_is_refused() -> None:
    with pytest.raises(ValueError, match="x has 60 inputs, and the weight 64"):
        fp8_linear(torch.empty(1, 60), _weight(64, 8, (1, 1)))
