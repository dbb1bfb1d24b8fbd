"""What RayLLM expects of torch's private names, on the torch that is installed."""

from __future__ import annotations

import pytest
import torch

from rayllm.torch_private import (
    abort_collectives,
    forget_group_count,
    has_native_products,
    has_packed_products,
    packed_product,
    packed_product_with,
    packed_weight,
)

needs_packed = pytest.mark.skipif(not has_packed_products(), reason="this torch has no packed products")


@needs_packed
def test_packed_products_are_those_of_the_plain_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TI, weight_OI, bias_O = (torch.randn(size, generator=generator) for size in ((3, 16), (8, 16), (8,)))
    other_TO = torch.randn(3, 8, generator=generator)
    expected_TO = torch.nn.functional.linear(x_TI, weight_OI, bias_O)
    packed = packed_weight(weight_OI.clone())
    torch.testing.assert_close(packed_product(x_TI, packed, bias_O), expected_TO)
    torch.testing.assert_close(packed_product(x_TI, packed, bias_O, "relu"), expected_TO.relu())
    torch.testing.assert_close(packed_product_with(x_TI, other_TO, packed, bias_O, "mul"), expected_TO * other_TO)
    torch.testing.assert_close(packed_product_with(x_TI, other_TO, packed, bias_O, "add"), expected_TO + other_TO)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cpus_instructions_are_known_or_said_not_to_be(dtype: torch.dtype) -> None:
    assert has_native_products(dtype) in (True, False, None)
    assert has_native_products(dtype) == has_native_products(dtype)


def test_an_operator_that_torch_does_not_have_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert has_native_products(torch.bfloat16) is None
    assert not has_packed_products()


def test_without_a_group_there_is_nothing_to_abort_and_the_count_begins_at_0() -> None:
    import torch.distributed.distributed_c10d as c10d

    abort_collectives()
    c10d._world.group_count = 3
    forget_group_count()
    assert c10d._world.group_count == 0
