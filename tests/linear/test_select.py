from __future__ import annotations

import pytest
import torch

from rayllm.linear.base import Linear
from rayllm.linear.dense import DenseLinear
from rayllm.linear.packed import PackedLinear
from rayllm.linear.select import dense_linear
from rayllm.linear.widened import WidenedLinear


@pytest.fixture
def supported(monkeypatch: pytest.MonkeyPatch) -> set[type]:
    """The classes that support every weight, beside the plain one."""
    found: set[type] = set()
    for kind in (PackedLinear, WidenedLinear):
        monkeypatch.setattr(kind, "supports", lambda weight, kind=kind: kind in found)
    return found


def _kind() -> type[Linear]:
    return type(dense_linear(torch.ones(4, 3)))


def test_the_fastest_class_that_supports_a_weight_is_taken(supported: set[type]) -> None:
    assert _kind() is DenseLinear
    supported.add(WidenedLinear)
    assert _kind() is WidenedLinear
    if torch.backends.mkldnn.is_available():
        supported.add(PackedLinear)
        assert _kind() is PackedLinear


def test_a_weight_of_whole_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.int8 cannot be multiplied"):
        dense_linear(torch.ones(4, 3, dtype=torch.int8))
