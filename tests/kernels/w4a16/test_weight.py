"""The checkpoints' layouts, written by their definitions, against the values they were made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from int4_checkpoints import as_awq, as_gptq, random_values
from torch import Tensor

from rayllm_kernels.w4a16 import Int4Weight, from_awq, from_gptq
from rayllm_kernels.w4a16.reference import dequantized

NUM_INPUTS, NUM_OUTPUTS = 320, 16


def _expected(values: dict[str, Tensor]) -> Tensor:
    groups = values["groups"]
    return (values["q"] - values["zeros"][groups].T) * values["scales"][groups].T.double()


def _check(weight: Int4Weight, values: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dequantized(weight).double(), _expected(values), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_awq_values_are_found(group_size: int) -> None:
    values = random_values(NUM_INPUTS, NUM_OUTPUTS, group_size)
    _check(from_awq(*as_awq(values), group_size=group_size), values)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("zeros_are_less_one", [False, True])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_gptq_values_are_found(group_size: int, zeros_are_less_one: bool, act_order: bool) -> None:
    values = random_values(NUM_INPUTS, NUM_OUTPUTS, group_size, act_order=act_order)
    tensors = as_gptq(values, zeros_are_less_one)
    weight = from_gptq(*tensors, group_size=group_size, zeros_are_less_one=zeros_are_less_one)
    _check(weight, values)
    assert (weight.order_I is not None) == (act_order and group_size != -1)


def test_symmetric_gptq_has_zeros_of_eight() -> None:
    values = random_values(64, 8, 32)
    qweight, qzeros, scales, _ = as_gptq(values, zeros_are_less_one=True)
    qzeros.fill_(0x77777777)
    weight = from_gptq(qweight, qzeros, scales, None, group_size=32, zeros_are_less_one=True)
    assert weight.zeros_GO.unique().tolist() == [8]


def _changed(name: str, change: Any) -> dict[str, Any]:
    qweight, qzeros, scales, g_idx = as_gptq(random_values(64, 8, 32), zeros_are_less_one=False)
    tensors = {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx}
    return {**tensors, "group_size": 32, "zeros_are_less_one": False, name: change(tensors.get(name))}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("scales", lambda x: x[:1], r"scales of shape \(1, 8\) do not fit 64 inputs: \(2, 8\)"),
        ("qzeros", lambda x: x[:1], r"zeros of shape \(1, 8\)"),
        ("qweight", lambda x: x.long(), "qweight is torch.int64: int32"),
        ("g_idx", lambda x: x[:5], r"g_idx has shape \(5,\), and the weight 64 inputs"),
        (
            "g_idx",
            lambda x: x.clamp(max=0),
            r"g_idx has groups of \[64\] inputs: each but the last must",
        ),
    ],
)
def test_what_does_not_fit_is_refused(name: str, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_gptq(**_changed(name, change))


def test_groups_smaller_than_what_is_multiplied_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="group_size=24 is not supported: use a multiple of 32"):
        from_awq(*as_awq(random_values(72, 8, 24)), group_size=24)


def test_awq_words_must_be_int32() -> None:
    qweight, qzeros, scales = as_awq(random_values(64, 8, 32))
    with pytest.raises(ValueError, match=r"qzeros is torch.int16"):
        from_awq(qweight, qzeros.short(), scales, group_size=32)
