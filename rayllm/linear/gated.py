"""activation(gate(x)) * up(x), the first half of a gated feed-forward layer. Shape letters: T tokens, D inputs, I inner
width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rayllm.linear.select import dense_linear
from rayllm.spec import ClampedSwiglu
from rayllm_kernels.activation import GATED_ACTIVATIONS, clamped_swiglu

if TYPE_CHECKING:
    from rayllm.linear.base import Linear


class GatedLinear(ABC):
    """activation(gate(x)) * up(x)."""

    @abstractmethod
    def __call__(self, x_TD: Tensor) -> Tensor: ...


class SeparateGatedLinear(GatedLinear):
    """Two products, where the second can multiply its result with the first's: no intermediate is written."""

    def __init__(self, gate: Linear, up: Linear, activation: str):
        self._gate, self._up, self._activation = gate, up, activation

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self._up.times(x_TD, self._gate.activated(x_TD, self._activation))


class JoinedGatedLinear(GatedLinear):
    """One product for both, `[gate; up]` by rows, then one elementwise kernel."""

    def __init__(self, gate_up: Linear, activation: str | ClampedSwiglu):
        self._gate_up, self._activation = gate_up, activation

    def __call__(self, x_TD: Tensor) -> Tensor:
        return gated(self._gate_up(x_TD), self._activation)


def gated(gate_up_TI2: Tensor, activation: str | ClampedSwiglu) -> Tensor:
    """activation(gate) * up of a matrix whose left half is the gate; the matrix may be changed."""
    if isinstance(activation, ClampedSwiglu):
        return clamped_swiglu(gate_up_TI2, activation.alpha, activation.limit)
    return GATED_ACTIVATIONS[activation](gate_up_TI2)


def gated_linear(
    gate: tuple[Tensor, Tensor | None], up: tuple[Tensor, Tensor | None], activation: str | ClampedSwiglu
) -> GatedLinear:
    """The faster of both for plain weights, each given with its bias or None; either both have a bias or neither."""
    if not isinstance(activation, ClampedSwiglu):
        linear = dense_linear(*gate)
        if linear.fuses_elementwise:
            return SeparateGatedLinear(linear, dense_linear(*up), activation)
    biases = [bias for _, bias in (gate, up) if bias is not None]
    joined = dense_linear(torch.cat((gate[0], up[0])), torch.cat(biases) if biases else None)
    return JoinedGatedLinear(joined, activation)
