"""Keys and values into pages, several heads of a token to a program. Shape letters: see `reference`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.launch import launch

_TILE = 1024
"""Numbers that a program copies, at least where there are so many."""


def write_kv(
    k_TKD: Tensor,
    v_TKD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Tensor,
    rows: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """See `reference.write_kv`; `rows` is not needed. The caches are contiguous."""
    num_tokens, num_heads, width = k_TKD.shape
    block = triton.next_power_of_2(width)
    heads = min(triton.next_power_of_2(num_heads), max(1, _TILE // block))
    launch(
        _write_kv,
        (num_tokens, triton.cdiv(num_heads, heads)),
        k_TKD,
        v_TKD,
        k_cache,
        v_cache,
        slots_T,
        *k_TKD.stride()[:2],
        *v_TKD.stride()[:2],
        k_scale,
        v_scale,
        K=num_heads,
        D=width,
        PAGE=k_cache.shape[2],
        FP8=k_cache.dtype == torch.float8_e4m3fn,
        HEADS=heads,
        BLOCK=block,
        num_warps=4,
    )


def write_latent(latent_TW: Tensor, cache: Tensor, slots_T: Tensor, scale: float = 1.0) -> None:
    """See `reference.write_latent`."""
    num_tokens, width = latent_TW.shape
    launch(
        _write_latent,
        (num_tokens,),
        latent_TW,
        cache,
        slots_T,
        latent_TW.stride(0),
        scale,
        W=width,
        FP8=cache.dtype == torch.float8_e4m3fn,
        BLOCK=triton.next_power_of_2(width),
        num_warps=2,
    )


@triton.jit
def store_rounded(x, out_ptr, mask, scale, FP8: tl.constexpr):
    """Stores float32 in the dtype of its place; in 8 bits x / scale, which saturates and keeps NaN."""
    if FP8:
        x = x / scale
        x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
    tl.store(out_ptr, x.to(out_ptr.dtype.scalar.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=("slots_ptr",))  # a KV group's row of an odd number of tokens
def _write_kv(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    k_scale,
    v_scale,
    K: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    FP8: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    mask = (head < tl.where(slot >= 0, K, 0)) & (channel < D)
    place = slot // PAGE * (K * PAGE * D) + slot % PAGE * D + head * (PAGE * D) + channel
    k = tl.load(k_ptr + token * k_stride_token + head * k_stride_head + channel, mask=mask, other=0.0)
    v = tl.load(v_ptr + token * v_stride_token + head * v_stride_head + channel, mask=mask, other=0.0)
    store_rounded(k.to(tl.float32), k_cache_ptr + place, mask, k_scale, FP8)
    store_rounded(v.to(tl.float32), v_cache_ptr + place, mask, v_scale, FP8)


@triton.jit(do_not_specialize_on_alignment=("slots_ptr",))  # a KV group's row of an odd number of tokens
def _write_latent(
    latent_ptr, cache_ptr, slots_ptr, stride_token, scale, W: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    channel = tl.arange(0, BLOCK)
    mask = channel < tl.where(slot >= 0, W, 0)
    x = tl.load(latent_ptr + token * stride_token + channel, mask=mask, other=0.0).to(tl.float32)
    store_rounded(x, cache_ptr + slot * W + channel, mask, scale, FP8)
