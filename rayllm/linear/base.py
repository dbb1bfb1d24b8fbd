"""What a layer asks of a linear layer, however its weight is stored. Shape letters: T tokens, I inputs, O outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from rayllm_kernels.activation import ACTIVATIONS


class Linear(ABC):
    """x @ weight.T + bias.

    A subclass is one way to store and multiply a weight. It must implement the product, and overrides the combinations
    below where it can do them in fewer passes over memory.
    """

    fuses_elementwise = False
    """Whether `activated` and `times` write no intermediate result: two products are then better than one joined."""

    def __init__(self, num_inputs: int, num_outputs: int):
        self.num_inputs = num_inputs
        self.num_outputs = num_outputs

    @abstractmethod
    def __call__(self, x_TI: Tensor) -> Tensor:
        """`[T, O]`, a tensor that the caller may change."""

    def activated(self, x_TI: Tensor, activation: str) -> Tensor:
        """activation(x @ weight.T + bias); `activation` is a key of `rayllm_kernels.activation.ACTIVATIONS`."""
        return ACTIVATIONS[activation](self(x_TI))

    def times(self, x_TI: Tensor, factor_TO: Tensor) -> Tensor:
        """(x @ weight.T + bias) * factor."""
        return self(x_TI).mul_(factor_TO)

    def plus(self, x_TI: Tensor, residual_TO: Tensor) -> Tensor:
        """x @ weight.T + bias + residual, which may be written to `residual_TO`: its values are lost."""
        return self(x_TI).add_(residual_TO)
