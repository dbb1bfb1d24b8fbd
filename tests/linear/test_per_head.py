from __future__ import annotations

import pytest
import torch

from rayllm.linear import PerHeadLinear, WidenedLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 33])
@pytest.mark.parametrize("widens", [True, False])
def test_each_head_has_a_product_of_its_own(
    widens: bool, num_tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether 16-bit floats are multiplied as they are, or widened first; with inputs of each head and shared ones."""
    monkeypatch.setattr(WidenedLinear, "supports", lambda weight: widens)
    weight_HOI = torch.randn(3, 5, 4).to(dtype)
    x_THI = torch.randn(num_tokens, 3, 4).to(dtype)
    linear = PerHeadLinear(weight_HOI)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2

    expected_THO = torch.einsum("thi,hoi->tho", x_THI.double(), weight_HOI.double())
    torch.testing.assert_close(linear(x_THI).double(), expected_THO, atol=tolerance, rtol=tolerance)

    wide_THW = torch.full((num_tokens, 3, 7), 9.0, dtype=dtype)
    linear.into(x_THI, wide_THW[..., :5])
    torch.testing.assert_close(wide_THW[..., :5].double(), expected_THO, atol=tolerance, rtol=tolerance)
    assert (wide_THW[..., 5:] == 9).all()

    wide_HTW = torch.full((2, num_tokens, 7), 9.0, dtype=dtype)
    linear.of_shared(x_THI[:, 0], range(1, 3), wide_HTW[..., :5])
    expected_HTO = torch.einsum("ti,hoi->hto", x_THI[:, 0].double(), weight_HOI[1:3].double())
    torch.testing.assert_close(wide_HTW[..., :5].double(), expected_HTO, atol=tolerance, rtol=tolerance)
    assert (wide_HTW[..., 5:] == 9).all()


def test_the_weight_is_not_copied() -> None:
    weight_HOI = torch.zeros(2, 3, 4)
    linear = PerHeadLinear(weight_HOI)
    weight_HOI += 1
    assert (linear(torch.ones(1, 2, 4)) == 4).all()
