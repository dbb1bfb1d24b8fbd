from __future__ import annotations

import torch

from rayllm.layers.router import Router
from rayllm.spec import RouterSpec
from rayllm.weights.source import DummyWeights

CPU = torch.device("cpu")


class _Weights(DummyWeights):
    """A router's parameters, and the dtype that each was asked for in."""

    def __init__(self) -> None:
        super().__init__(0, torch.bfloat16, CPU)
        self.dtypes: dict[str, torch.dtype | None] = {}

    def tensor(self, name: str, shape: tuple[int, ...], **options: object) -> torch.Tensor:
        self.dtypes[name] = options.get("dtype")  # type: ignore[assignment]
        if name == "router.bias":
            return torch.tensor([0.0, 9.0, 0.0, 0.0], dtype=self.dtypes[name] or torch.bfloat16)
        if name == "router.choice_bias":
            return torch.tensor([9.0, 0.0, 0.0, 0.0])
        return super().tensor(name, shape, **options)  # type: ignore[arg-type]


def test_a_bias_changes_choice_and_scores_and_a_choice_bias_the_choice_alone() -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    plain, biased, chosen = (
        Router(_Weights(), "router", RouterSpec(4, 1, "sigmoid", renormalize=False, float32=True, **fields), 8)(x)
        for fields in ({}, {"bias": True}, {"has_choice_bias": True})
    )
    assert set(plain[0].flatten().tolist()) > {1}
    assert biased[0].flatten().tolist() == [1] * 5
    assert (biased[1] > 0.95).all()
    assert chosen[0].flatten().tolist() == [0] * 5
    assert (chosen[1] < 0.95).any()


def test_parameters_are_float32_where_the_product_is() -> None:
    fields = {"bias": True, "has_choice_bias": True}
    for float32, expected in ((True, torch.float32), (False, None)):
        weights = _Weights()
        spec = RouterSpec(4, 2, "softmax", renormalize=True, float32=float32, **fields)  # type: ignore[arg-type]
        _, scores = Router(weights, "router", spec, 8)(torch.ones(3, 8, dtype=torch.bfloat16))
        assert weights.dtypes["router.weight"] == weights.dtypes["router.bias"] == expected
        assert weights.dtypes["router.choice_bias"] == torch.float32
        assert scores.dtype == torch.float32
