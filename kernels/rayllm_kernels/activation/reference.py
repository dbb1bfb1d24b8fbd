"""Activations by name, alone and times a gate. Shape letters: T tokens, I width of the feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up_TI2: Tensor) -> Tensor:
    """silu(gate) * up of a `[T, 2 I]` matrix whose left half is the gate; returns a contiguous `[T, I]`."""
    gate, up = gate_up_TI2.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_mul(gate_up_TI2: Tensor) -> Tensor:
    """gelu(gate) * up, as `silu_mul`."""
    gate, up = gate_up_TI2.chunk(2, dim=-1)
    return F.gelu(gate).mul_(up)


def gelu_tanh_mul(gate_up_TI2: Tensor) -> Tensor:
    """The approximation of gelu by tanh, of gate, times up, as `silu_mul`."""
    gate, up = gate_up_TI2.chunk(2, dim=-1)
    return _gelu_tanh(gate).mul_(up)


def relu_mul(gate_up_TI2: Tensor) -> Tensor:
    """relu(gate) * up, as `silu_mul`."""
    gate, up = gate_up_TI2.chunk(2, dim=-1)
    return torch.relu(gate).mul_(up)


def clamped_swiglu(gate_up_TI2: Tensor, alpha: float, limit: float) -> Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate) of a `[T, 2 I]` matrix whose left half is the gate, at most `limit`, and
    whose right half is up, within +-`limit`; returns a contiguous `[T, I]`. The matrix may be changed."""
    gate, up = gate_up_TI2.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    return gate.mul_(torch.sigmoid(alpha * gate)).mul_(up.clamp_(-limit, limit).add_(1))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
}
