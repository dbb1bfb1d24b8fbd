"""Where layers take their parameters from: a checkpoint, or numbers drawn from a seed."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rayllm.linear import (
    ExpertLinear,
    GatedLinear,
    Linear,
    StackedExperts,
    dense_linear,
    expert_gated_linear,
    expert_linear,
    gated_linear,
)
from rayllm.spec import ClampedSwiglu
from rayllm_kernels.random_weights import uniform_part


@dataclass(frozen=True, slots=True)
class Outputs:
    """The outputs of one module that a linear layer computes: `size` in all, of which this rank holds `part`.

    `part` may reach past the end (a padded vocabulary): outputs past the end are zero.
    """

    module: str
    """Its parameters are `{module}.weight` and `{module}.bias`."""
    size: int
    part: range | None = None
    """None: all."""


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """The experts that this rank holds of a mixture's `total`."""

    held: range
    total: int


class WeightSource(ABC):
    """Gives parameters by RayLLM's names (`layers.3.q.weight`), cut to the part that a rank holds."""

    @abstractmethod
    def tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        dim: int = 0,
        part: range | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The parameter `name`, whose full shape is `shape`, cut to `part` along `dim`; its `dtype` is the model's, if
        none is given.

        `part` may reach past the end of `dim` (a padded vocabulary): what is past the end is zero.
        """

    @abstractmethod
    def expert_tensors(
        self, name: str, shape: tuple[int, ...], experts: range, *, dim: int = 0, part: range | None = None
    ) -> Iterator[Tensor]:
        """The parameter `name` of `experts`, one after another, cut to `part` along `dim`. `shape` is that of all
        experts' together, `[E, ...]`; `dim` counts the dimensions of one expert's."""

    def linear(
        self,
        outputs: Sequence[Outputs],
        num_inputs: int,
        *,
        inputs: range | None = None,
        bias: bool = False,
        holds_bias: bool = True,
    ) -> Linear:
        """One linear layer that computes the outputs of several modules, one after another, from the same inputs.

        `inputs` are the inputs that this rank holds (row parallelism), all by default. `bias`: the modules have one;
        with `holds_bias=False` it belongs to another rank and is left out here.
        """
        weights = [self._weight(each, num_inputs, inputs) for each in outputs]
        if bias and not holds_bias:
            for each in outputs:
                self.leave_to_others(f"{each.module}.bias", (each.size,))
        biases = [self._bias(each) for each in outputs] if bias and holds_bias else []
        return dense_linear(_joined(weights), _joined(biases) if biases else None)

    def gated_linear(
        self, gate: Outputs, up: Outputs, num_inputs: int, activation: str, *, bias: bool = False
    ) -> GatedLinear:
        """activation(gate(x)) * up(x)."""
        gate_weight, up_weight = (self._weight(each, num_inputs) for each in (gate, up))
        gate_bias, up_bias = (self._bias(each) if bias else None for each in (gate, up))
        return gated_linear((gate_weight, gate_bias), (up_weight, up_bias), activation)

    def expert_linear(
        self,
        outputs: Outputs,
        num_inputs: int,
        experts: ExpertPart,
        *,
        inputs: range | None = None,
        bias: bool = False,
        holds_bias: bool = True,
    ) -> ExpertLinear | StackedExperts:
        """`linear` of one module, by each of a mixture's `experts`."""
        if bias and not holds_bias:
            self.leave_to_others(f"{outputs.module}.bias", (experts.total, outputs.size))
        parameters = self._expert_parameters(outputs, num_inputs, experts, inputs, bias=bias and holds_bias)
        return expert_linear(parameters, len(experts.held))

    def expert_gated_linear(
        self,
        gate: Outputs,
        up: Outputs,
        num_inputs: int,
        experts: ExpertPart,
        activation: str | ClampedSwiglu,
        *,
        bias: bool = False,
    ) -> ExpertLinear | StackedExperts:
        """`gated_linear` by each of a mixture's `experts`."""
        gates, ups = (self._expert_parameters(each, num_inputs, experts, None, bias=bias) for each in (gate, up))
        return expert_gated_linear(gates, ups, len(experts.held), activation)

    def _expert_parameters(
        self, outputs: Outputs, num_inputs: int, experts: ExpertPart, inputs: range | None, *, bias: bool
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        shape = (experts.total, outputs.size, num_inputs)
        dim, part = (0, outputs.part) if inputs is None else (1, inputs)
        weights = self.expert_tensors(f"{outputs.module}.weight", shape, experts.held, dim=dim, part=part)
        if not bias:
            return ((weight, None) for weight in weights)
        name = f"{outputs.module}.bias"
        return zip(weights, self.expert_tensors(name, shape[:2], experts.held, part=outputs.part), strict=True)

    @abstractmethod
    def leave_to_others(self, name: str, shape: tuple[int, ...]) -> None:
        """Says that other ranks hold this parameter and this one does not; it is checked all the same."""

    def _weight(self, outputs: Outputs, num_inputs: int, inputs: range | None = None) -> Tensor:
        shape = (outputs.size, num_inputs)
        dim, part = (0, outputs.part) if inputs is None else (1, inputs)
        return self.tensor(f"{outputs.module}.weight", shape, dim=dim, part=part)

    def _bias(self, outputs: Outputs) -> Tensor:
        return self.tensor(f"{outputs.module}.bias", (outputs.size,), part=outputs.part)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def clip(part: range, size: int) -> range:
    """What of `part` lies within `size` entries."""
    return range(min(part.start, size), min(part.stop, size))


def pad_to(tensor: Tensor, dim: int, size: int) -> Tensor:
    """`tensor` with zeros appended along `dim` until it has `size` entries."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat((tensor, tensor.new_zeros(shape)), dim=dim)


class DummyWeights(WeightSource):
    """Random weights, each a function of (seed, name): all ranks cut the same full tensor, whatever their number. On a
    GPU they are drawn there, as other numbers than on a CPU."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device):
        self._seed = seed
        self._dtype = dtype
        self._device = device

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        dim: int = 0,
        part: range | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        part = range(shape[dim]) if part is None else part
        dtype = dtype or self._dtype
        if len(shape) == 1 or name.endswith("bias"):
            full = torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype, device=self._device)
            return _cut(full, dim, part)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little") >> 1
        bound = math.sqrt(3.0 / shape[-1])  # a variance of 1 / fan-in keeps activations of order one
        if self._device.type == "cuda":
            own = (*shape[:dim], len(part), *shape[dim + 1 :])
            return uniform_part(torch.empty(own, dtype=dtype, device=self._device), shape, dim, part, seed, bound)
        generator = torch.Generator().manual_seed(seed)
        full = torch.empty(shape, dtype=dtype).uniform_(-bound, bound, generator=generator)
        return _cut(full, dim, part).to(self._device)

    def expert_tensors(
        self, name: str, shape: tuple[int, ...], experts: range, *, dim: int = 0, part: range | None = None
    ) -> Iterator[Tensor]:
        module, _, leaf = name.rpartition(".")
        return (self.tensor(f"{module}.{expert}.{leaf}", shape[1:], dim=dim, part=part) for expert in experts)

    def leave_to_others(self, name: str, shape: tuple[int, ...]) -> None:
        pass


def _cut(full: Tensor, dim: int, part: range) -> Tensor:
    inside = clip(part, full.shape[dim])
    return pad_to(full.narrow(dim, inside.start, len(inside)), dim, len(part)).contiguous()
