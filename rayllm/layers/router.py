"""The choice of experts for each token. Shape letters: T tokens, D hidden width, E experts, K experts a token takes."""

from __future__ import annotations

import torch
from torch import Tensor

from rayllm.linear import dense_linear
from rayllm.spec import RouterSpec
from rayllm.weights.source import WeightSource
from rayllm_kernels.moe import choose_experts


class Router:
    """What a `RouterSpec` says. Every rank has all of it, so that all choose the same."""

    def __init__(self, weights: WeightSource, prefix: str, spec: RouterSpec, width: int):
        dtype = torch.float32 if spec.float32 else None
        weight = weights.tensor(f"{prefix}.weight", (spec.num_experts, width), dtype=dtype)
        bias = weights.tensor(f"{prefix}.bias", (spec.num_experts,), dtype=dtype) if spec.bias else None
        self._linear = dense_linear(weight, bias)
        self._choice_bias = None
        if spec.has_choice_bias:
            self._choice_bias = weights.tensor(f"{prefix}.choice_bias", (spec.num_experts,), dtype=torch.float32)
        self._spec = spec

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(experts_TK, scores_TK float32)."""
        spec = self._spec
        return choose_experts(
            self._linear(x_TD.float() if spec.float32 else x_TD),
            self._choice_bias,
            spec.top_k,
            spec.scoring,
            renormalize=spec.renormalize,
            scale=spec.scale,
            num_groups=spec.num_groups,
            top_groups=spec.top_groups,
            group_score=spec.group_score,
        )
