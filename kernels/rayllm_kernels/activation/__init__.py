"""Activations of feed-forward layers. `reference` says what each function computes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rayllm_kernels.activation import reference
from rayllm_kernels.activation.reference import ACTIVATIONS
from rayllm_kernels.device import uses_triton

__all__ = [
    "ACTIVATIONS",
    "GATED_ACTIVATIONS",
    "clamped_swiglu",
    "gelu_mul",
    "gelu_tanh_mul",
    "relu_mul",
    "silu_mul",
]


def silu_mul(gate_up_TI2: Tensor) -> Tensor:
    """silu(gate) * up."""
    if uses_triton(gate_up_TI2):
        from rayllm_kernels.activation import triton

        return triton.silu_mul(gate_up_TI2)
    return reference.silu_mul(gate_up_TI2)


def gelu_mul(gate_up_TI2: Tensor) -> Tensor:
    """gelu(gate) * up."""
    if uses_triton(gate_up_TI2):
        from rayllm_kernels.activation import triton

        return triton.gelu_mul(gate_up_TI2)
    return reference.gelu_mul(gate_up_TI2)


def gelu_tanh_mul(gate_up_TI2: Tensor) -> Tensor:
    """gelu(gate) * up, with the approximation by tanh."""
    if uses_triton(gate_up_TI2):
        from rayllm_kernels.activation import triton

        return triton.gelu_tanh_mul(gate_up_TI2)
    return reference.gelu_tanh_mul(gate_up_TI2)


def relu_mul(gate_up_TI2: Tensor) -> Tensor:
    """relu(gate) * up."""
    if uses_triton(gate_up_TI2):
        from rayllm_kernels.activation import triton

        return triton.relu_mul(gate_up_TI2)
    return reference.relu_mul(gate_up_TI2)


def clamped_swiglu(gate_up_TI2: Tensor, alpha: float, limit: float) -> Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate), both clamped."""
    if uses_triton(gate_up_TI2):
        from rayllm_kernels.activation import triton

        return triton.clamped_swiglu(gate_up_TI2, alpha, limit)
    return reference.clamped_swiglu(gate_up_TI2, alpha, limit)


GATED_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu_mul,
    "relu": relu_mul,
    "gelu": gelu_mul,
    "gelu_tanh": gelu_tanh_mul,
}
"""activation(gate) * up of `[T, 2 I]`, for each of `ACTIVATIONS`."""
