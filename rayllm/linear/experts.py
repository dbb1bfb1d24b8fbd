"""Linear layers of a mixture's experts. Shape letters: N rows sorted by expert, E experts that the rank holds, I
inputs, O outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from rayllm.linear.gated import gated_linear
from rayllm.linear.select import dense_linear
from rayllm.spec import ClampedSwiglu
from rayllm_kernels.device import uses_triton

Parameters = tuple[Tensor, Tensor | None]
"""An expert's weight and bias."""


class ExpertLinear(ABC):
    """One function for each expert, applied to rows that are sorted by expert.

    A subclass is one way to store and multiply the experts' weights: a product with a bias, or
    activation(gate(x)) * up(x).
    """

    @abstractmethod
    def __call__(self, x_NI: Tensor, counts: Sequence[int]) -> Tensor:
        """`[N, O]`, a tensor that the caller may change; the first `counts[0]` rows are the first expert's."""


class SeparateExperts(ExpertLinear):
    """A layer of its own for each expert; only those that have rows are called."""

    def __init__(self, layers: Iterable[Callable[[Tensor], Tensor]], num_outputs: int):
        self._layers = list(layers)
        self._num_outputs = num_outputs

    def __call__(self, x_NI: Tensor, counts: Sequence[int]) -> Tensor:
        parts = [layer(rows) for layer, rows in zip(self._layers, x_NI.split(list(counts)), strict=True) if len(rows)]
        if not parts:
            return x_NI.new_empty(0, self._num_outputs)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True, slots=True)
class StackedExperts:
    """One tensor for the weights of all experts, and one for their biases: a kernel multiplies a layer's two products
    for all rows at once (`rayllm_kernels.moe.mix_experts`)."""

    weight_EOI: Tensor
    bias_EO: Tensor | None
    activation: str | ClampedSwiglu | None = None
    """With one, the weights are [gate; up] by rows, and activation(gate(x)) * up(x) is meant."""


def expert_linear(experts: Iterable[Parameters], num_experts: int) -> ExpertLinear | StackedExperts:
    """x @ weight.T + bias by each expert, for plain weights on this device; they are taken one after another."""
    first, experts = _peek(experts)
    if not uses_triton(first[0]):
        return SeparateExperts((dense_linear(*expert) for expert in experts), first[0].shape[0])
    return StackedExperts(*_stacked(experts, num_experts))


def expert_gated_linear(
    gates: Iterable[Parameters], ups: Iterable[Parameters], num_experts: int, activation: str | ClampedSwiglu
) -> ExpertLinear | StackedExperts:
    """activation(gate(x)) * up(x) by each expert, as `expert_linear`."""
    first, gates = _peek(gates)
    pairs = zip(gates, ups, strict=True)
    if not uses_triton(first[0]):
        return SeparateExperts((gated_linear(*pair, activation) for pair in pairs), first[0].shape[0])
    joined = ((torch.cat((gate[0], up[0])), _joined_bias(gate[1], up[1])) for gate, up in pairs)
    return StackedExperts(*_stacked(joined, num_experts), activation)


def _peek(experts: Iterable[Parameters]) -> tuple[Parameters, Iterator[Parameters]]:
    experts = iter(experts)
    first = next(experts)
    return first, chain([first], experts)


def _stacked(experts: Iterable[Parameters], num_experts: int) -> Parameters:
    """Filled one expert at a time: no second copy of all is held."""
    weights: Tensor | None = None
    biases: Tensor | None = None
    for expert, (weight, bias) in enumerate(experts):
        if weights is None:
            weights = weight.new_empty(num_experts, *weight.shape)
            biases = None if bias is None else bias.new_empty(num_experts, *bias.shape)
        weights[expert] = weight
        if bias is not None and biases is not None:
            biases[expert] = bias
    assert weights is not None
    return weights, biases


def _joined_bias(gate_I: Tensor | None, up_I: Tensor | None) -> Tensor | None:
    return None if gate_I is None or up_I is None else torch.cat((gate_I, up_I))
