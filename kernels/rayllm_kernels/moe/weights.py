"""What a rank holds of a mixture's experts. Shape letters: E experts held, D hidden width, I inner width."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Experts that are down(activation(gate(x)) * up(x)), stacked in one tensor for each product."""

    gate_up_E2ID: Tensor
    """The rows of each expert are [gate; up]. Contiguous, as all of these."""
    gate_up_bias_E2I: Tensor | None
    down_EDI: Tensor
    down_bias_ED: Tensor | None
    activation: str
    """A key of `rayllm_kernels.activation.GATED_ACTIVATIONS`, or "clamped_swiglu"."""
    alpha: float = 1.0
    limit: float = 0.0
    """Of the clamped SwiGLU."""
    first: int = 0
    """The number, among all experts, of the first one held; those held are neighbours."""
    total: int | None = None
    """Experts of all ranks together; None: those held."""
    scores_weigh_inputs: bool = False
    """A score multiplies the expert's input instead of its output (Llama 4)."""

    @property
    def held(self) -> range:
        return range(self.first, self.first + self.down_EDI.shape[0])
