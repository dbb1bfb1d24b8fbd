from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rayllm.linear.base import Linear
from rayllm_kernels.activation import ACTIVATIONS


class _Doubling(Linear):
    """Implements the product alone."""

    def __call__(self, x_TI: Tensor) -> Tensor:
        return 2 * x_TI


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_a_subclass_with_the_product_alone_has_all_combinations() -> None:
    layer, other = _Doubling(4, 4), torch.full((3, 4), 0.5)
    before = other.clone()
    assert torch.equal(layer.plus(X, other), 2 * X + 0.5)
    assert torch.equal(layer.times(X, other), X)
    assert torch.equal(other, before), "operands are not changed"
    for name, function in ACTIVATIONS.items():
        assert torch.equal(layer.activated(X, name), function(2 * X))


def test_a_linear_without_a_product_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Linear(4, 4)  # type: ignore[abstract]
