"""Tokens with experts, unevenly chosen, and what a mixture of them is in float64, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kernel_accuracy import random_tensor
from torch import Tensor

from rayllm_kernels.moe import ExpertWeights

ALPHA, LIMIT = 1.702, 1.5


def _clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    return (up + 1) * gate * torch.sigmoid(ALPHA * gate)


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda gate, up: gate * torch.sigmoid(gate) * up,
    "gelu": lambda gate, up: gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up,
    "clamped_swiglu": _clamped_swiglu,
}

ROUTINGS: dict[str, list[list[int]]] = {
    "uneven": [[0, 5], [5, 0], [5, 2], [2, 5], [3, 5], [0, 5], [2, 5]],
    "one expert has all": [[4]] * 19,
    "one token": [[6, 1, 3]],
    "no token": [],
}
"""The experts, of seven, that each token takes."""


@dataclass(frozen=True)
class Inputs:
    args: tuple[Tensor, Tensor, Tensor, ExpertWeights]
    """Of `mix_experts`."""
    added: dict[str, Tensor]

    def expected(self) -> Tensor:
        x, experts, scores, weights = self.args
        rows = [
            _token(x[t].double(), experts[t].tolist(), scores[t].tolist(), weights) + self._added(t)
            for t in range(len(x))
        ]
        return torch.stack(rows)

    def _added(self, token: int) -> Tensor:
        row = {name: values[token].double() for name, values in self.added.items()}
        zero = torch.zeros(1, dtype=torch.float64)
        gate = torch.sigmoid(row["shared_gate_T1"]) if "shared_gate_T1" in row else 1.0
        return row.get("shared_TD", zero) * gate + row.get("residual_TD", zero)


def _token(x: Tensor, experts: list[int], scores: list[float], weights: ExpertWeights) -> Tensor:
    out = torch.zeros(weights.down_EDI.shape[1], dtype=torch.float64)
    for expert, score in zip(experts, scores, strict=True):
        if expert not in weights.held:
            continue
        place = expert - weights.first
        before, after = (score, 1.0) if weights.scores_weigh_inputs else (1.0, score)
        gate_up = weights.gate_up_E2ID[place].double() @ (x * before)
        if weights.gate_up_bias_E2I is not None:
            gate_up += weights.gate_up_bias_E2I[place].double()
        y = weights.down_EDI[place].double() @ ACTIVATIONS[weights.activation](*gate_up.chunk(2))
        if weights.down_bias_ED is not None:
            y += weights.down_bias_ED[place].double()
        out += after * y
    return out


@dataclass(frozen=True)
class Case:
    routing: str = "uneven"
    activation: str = "silu"
    bias: bool = False
    held: tuple[int, int] = (0, 7)
    weighs_inputs: bool = False
    added: tuple[str, ...] = ()
    width: int = 24
    inner: int = 20

    def __str__(self) -> str:
        defaults = Case()
        changed = (str(value) for name, value in vars(self).items() if value != getattr(defaults, name))
        return "-".join(changed) or "plain"

    def weights(self, dtype: torch.dtype) -> ExpertWeights:
        first, end = self.held
        count, width, inner = end - first, self.width, self.inner
        return ExpertWeights(
            random_tensor(count, 2 * inner, width, dtype=dtype, seed=1) / width**0.5,
            random_tensor(count, 2 * inner, dtype=dtype, seed=2) if self.bias else None,
            random_tensor(count, width, inner, dtype=dtype, seed=3) / inner**0.5,
            random_tensor(count, width, dtype=dtype, seed=4) if self.bias else None,
            self.activation,
            ALPHA,
            LIMIT,
            first,
            7,
            self.weighs_inputs,
        )

    def inputs(self, dtype: torch.dtype) -> Inputs:
        routing = ROUTINGS[self.routing]
        experts = torch.tensor(routing, dtype=torch.int32).view(len(routing), -1 if routing else 2)
        shapes = {"shared_TD": self.width, "shared_gate_T1": 1, "residual_TD": self.width}
        added: dict[str, Any] = {
            name: random_tensor(len(routing), shapes[name], dtype=dtype, seed=5 + i)
            for i, name in enumerate(self.added)
        }
        x = random_tensor(len(routing), self.width, dtype=dtype)
        scores = random_tensor(*experts.shape, seed=9).sigmoid()
        return Inputs((x, experts, scores, self.weights(dtype)), added)


NO_TOKEN = Case("no token")
CASES = [
    Case(),
    Case("one expert has all", width=37, inner=19),
    Case("one token", activation="gelu", bias=True),
    Case(activation="clamped_swiglu", bias=True, weighs_inputs=True, added=("shared_TD", "residual_TD")),
    Case(held=(2, 5), bias=True, width=65, added=("shared_TD", "shared_gate_T1")),
    Case("one token", held=(4, 6), added=("residual_TD",)),
]
