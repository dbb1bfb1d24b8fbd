"""Norms where each program holds whole rows: `x` is read once. Shape letters: N rows, D width."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.launch import launch

_MIN_TILE = 1024
"""Numbers that a program has at least: narrow rows go several to a program."""


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`. Rows of `x` may stand apart (a slice of a wider matrix)."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rms_norm(x, None, weight_D, eps, out)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`; `residual` is contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rms_norm(x, residual, weight_D, eps, out)
    return out, residual


def rms_norm_add(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm_add`; `residual` is contiguous."""
    _launch_rms_norm(x, residual, weight_D, eps, residual)
    return residual


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    """See `reference.layer_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, num_heads, stride_row, stride_head = _rows(x)
    rows, block = _tile(x.shape[-1])
    launch(
        _layer_norm,
        (triton.cdiv(num_rows, rows),),
        x,
        weight_D,
        bias_D,
        out,
        num_rows,
        num_heads,
        stride_row,
        stride_head,
        eps,
        D=x.shape[-1],
        ROWS=rows,
        BLOCK=block,
        num_warps=_num_warps(rows * block),
    )
    return out


def _launch_rms_norm(x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float, out: Tensor) -> None:
    """Where `out` is the residual, what is normed is added to it; else it is what is normed, with `x`."""
    num_rows, num_heads, stride_row, stride_head = _rows(x)
    rows, block = _tile(x.shape[-1])
    launch(
        _rms_norm,
        (triton.cdiv(num_rows, rows),),
        x,
        residual,
        weight_D,
        out,
        num_rows,
        num_heads,
        stride_row,
        stride_head,
        weight_D.stride(0) if weight_D.dim() == 2 else 0,
        eps,
        D=x.shape[-1],
        NORM_FIRST=residual is out,
        ROWS=rows,
        BLOCK=block,
        num_warps=_num_warps(rows * block),
    )


def _rows(x: Tensor) -> tuple[int, int, int, int]:
    """(rows, heads, stride of what holds the heads, stride of a head) of `[T, D]` or `[T, heads, D]`."""
    assert x.dim() in (2, 3), f"a norm of {x.dim()} dimensions"
    assert x.stride(-1) == 1, "channels must be neighbours"
    num_heads = 1 if x.dim() == 2 else x.shape[1]
    return x.shape[0] * num_heads, num_heads, x.stride(0), 0 if x.dim() == 2 else x.stride(1)


def _tile(width: int) -> tuple[int, int]:
    """(rows, channels) of a program."""
    block = triton.next_power_of_2(width)
    return max(1, _MIN_TILE // block), block


def _num_warps(tile_size: int) -> int:
    return min(16, max(1, tile_size // 512))


@triton.jit(do_not_specialize=("num_rows",))  # it varies from step to step
def _rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    num_heads,
    stride_row,
    stride_head,
    weight_stride_head,
    eps,
    D: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < num_rows) & (column < D)
    head = row % num_heads
    wide_row = row.to(tl.int64)
    x = tl.load(x_ptr + wide_row // num_heads * stride_row + head * stride_head + column, mask=mask, other=0.0)
    x = x.to(tl.float32)
    place = wide_row * D + column
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if not NORM_FIRST:
            total = (x + residual).to(residual_ptr.dtype.element_ty)
            tl.store(residual_ptr + place, total, mask=mask)
            x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + eps)
    weight = tl.load(weight_ptr + head * weight_stride_head + column, mask=mask, other=0.0).to(tl.float32)
    out = (x * scale * weight).to(out_ptr.dtype.element_ty)
    if NORM_FIRST:
        out = (out.to(tl.float32) + residual).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, out, mask=mask)


@triton.jit(do_not_specialize=("num_rows",))  # it varies from step to step
def _layer_norm(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_heads,
    stride_row,
    stride_head,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < num_rows) & (column < D)
    wide_row = row.to(tl.int64)
    place = x_ptr + wide_row // num_heads * stride_row + row % num_heads * stride_head + column
    x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, x - tl.sum(x, axis=1, keep_dims=True) / D, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / D + eps)
    out = centred * scale * tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + wide_row * D + column, out.to(out_ptr.dtype.element_ty), mask=mask)
