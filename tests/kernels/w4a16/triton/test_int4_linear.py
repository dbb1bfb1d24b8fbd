"""Products with four-bit weights against the dequantized weight in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from int4_checkpoints import as_awq, as_gptq, random_values
from kernel_accuracy import Buffers, random_tensor, relative_error

from rayllm_kernels.w4a16 import Int4Weight, from_awq, from_gptq, reference
from rayllm_kernels.w4a16.reference import dequantized
from rayllm_kernels.w4a16.triton import int4_linear

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 3e-3}

SHAPES = {
    "one token": (1, 256, 64, 32),
    "parts": (3, 2080, 72, 128),  # inputs that end within a tile, in three parts
    "one group": (17, 328, 40, -1),
    "uneven groups": (5, 300, 24, 96),
    "more tokens than a program's": (70, 288, 136, 64),
}
"""(tokens, inputs, outputs, group size)."""


def _guarded(weight: Int4Weight, buffers: Buffers) -> Int4Weight:
    names = ("words_OW", "scales_GO", "zeros_GO", "arrivals")  # the last is zeros before and after
    return replace(weight, **{name: buffers.input(getattr(weight, name)) for name in names})


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_dequantized_weight(shape: str, dtype: torch.dtype, buffers: Buffers) -> None:
    num_tokens, num_inputs, num_outputs, group_size = SHAPES[shape]
    values = random_values(num_inputs, num_outputs, group_size)
    weight = _guarded(from_awq(*as_awq(values), group_size=group_size), buffers)
    x = buffers.input(random_tensor(num_tokens, num_inputs, dtype=dtype))
    bias = buffers.input(random_tensor(num_outputs, dtype=dtype, seed=1)) if num_tokens % 2 else None
    expected = x.double() @ dequantized(weight).double().T
    if bias is not None:
        expected += bias.double()
    for product in (int4_linear, reference.int4_linear):
        found = product(x, weight, bias)
        assert found.dtype == dtype
        assert relative_error(found, expected) < TOLERANCES[dtype]


def test_inputs_are_taken_in_the_order_of_their_groups() -> None:
    values = random_values(320, 16, 32, act_order=True)
    weight = from_gptq(*as_gptq(values, zeros_are_less_one=True), group_size=32, zeros_are_less_one=True)
    x = random_tensor(2, 320, dtype=torch.bfloat16)
    expected = x.double() @ dequantized(weight).double().T
    assert relative_error(int4_linear(x, weight), expected) < TOLERANCES[torch.bfloat16]


def test_a_token_gets_the_same_bits_whatever_others_are_in_the_step() -> None:
    values = random_values(1056, 16, 32)
    weight = from_awq(*as_awq(values), group_size=32)
    x = random_tensor(3, 1056, dtype=torch.bfloat16)
    assert torch.equal(int4_linear(x[1:2], weight), int4_linear(x, weight)[1:2])


def test_no_token_gives_no_row() -> None:
    weight = from_awq(*as_awq(random_values(64, 8, 32)), group_size=32)
    assert int4_linear(torch.empty(0, 64), weight).shape == (0, 8)


def test_another_number_of_inputs_is_refused() -> None:
    weight = from_awq(*as_awq(random_values(64, 8, 32)), group_size=32)
    with pytest.raises(ValueError, match="x has 60 inputs, and the weight 64"):
        int4_linear(torch.empty(1, 60), weight)
