"""Gated activations in one pass. Shape letters: T tokens, I width of the feed-forward layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.launch import launch

_BLOCK = 1024


def silu_mul(gate_up_TI2: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    return _gated(gate_up_TI2, "silu")


def gelu_mul(gate_up_TI2: Tensor) -> Tensor:
    """See `reference.gelu_mul`."""
    return _gated(gate_up_TI2, "gelu")


def gelu_tanh_mul(gate_up_TI2: Tensor) -> Tensor:
    """See `reference.gelu_tanh_mul`."""
    return _gated(gate_up_TI2, "gelu_tanh")


def relu_mul(gate_up_TI2: Tensor) -> Tensor:
    """See `reference.relu_mul`."""
    return _gated(gate_up_TI2, "relu")


def clamped_swiglu(gate_up_TI2: Tensor, alpha: float, limit: float) -> Tensor:
    """See `reference.clamped_swiglu`; the matrix is not changed."""
    return _gated(gate_up_TI2, "clamped_swiglu", alpha, limit)


def _gated(gate_up_TI2: Tensor, activation: str, alpha: float = 1.0, limit: float = 0.0) -> Tensor:
    assert gate_up_TI2.dim() == 2, f"gate and up of {gate_up_TI2.dim()} dimensions"
    assert gate_up_TI2.stride(1) == 1, "channels must be neighbours"
    num_tokens, width = gate_up_TI2.shape[0], gate_up_TI2.shape[1] // 2
    out_TI = torch.empty((num_tokens, width), dtype=gate_up_TI2.dtype, device=gate_up_TI2.device)
    launch(
        _gated_activation,
        (num_tokens, triton.cdiv(width, _BLOCK)),
        gate_up_TI2,
        out_TI,
        gate_up_TI2.stride(0),
        width,
        alpha,
        limit,
        ACTIVATION=activation,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return out_TI


@triton.jit
def _gated_activation(
    gate_up_ptr, out_ptr, stride_token, width, alpha, limit, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate_ptr = gate_up_ptr + token * stride_token
    gate = tl.load(gate_ptr + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + width + column, mask=mask, other=0.0).to(tl.float32)
    out = gate_times_up(gate, up, alpha, limit, ACTIVATION)
    tl.store(out_ptr + token * width + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gate_times_up(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """activation(gate) * up in float32. Comparisons, not minimum and maximum, which lose NaN: a fault must stay visible
    in the logits."""
    if ACTIVATION == "silu":
        out = gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "relu":
        out = tl.where(gate < 0.0, 0.0, gate) * up
    elif ACTIVATION == "gelu":
        out = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "gelu_tanh":  # 1 + tanh(z) is 2 * sigmoid(2 z); z = sqrt(2 / pi) * (gate + 0.044715 gate³)
        out = gate * tl.sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)) * up
    else:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        out = (up + 1.0) * gate * tl.sigmoid(alpha * gate)
    return out
