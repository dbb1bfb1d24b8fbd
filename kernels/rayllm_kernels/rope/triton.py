"""Rotation, norm and cache writes of a layer in one launch. Shape letters: see `reference`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.kv_cache.triton import store_rounded
from rayllm_kernels.launch import launch
from rayllm_kernels.rope.reference import HeadNorm, Rotation

_TILE = 1024
"""Numbers that a program of `rope_and_write` moves: several heads of one token."""
_ANGLES = 1024
"""Angles that a program of `cos_sin` computes."""


def cos_sin(
    positions_T: Tensor,
    frequencies_R: Tensor,
    factor: float,
    dtype: torch.dtype,
    beyond: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.cos_sin`."""
    num_tokens, width = positions_T.shape[0], frequencies_R.shape[0]
    cos_TR, sin_TR = (torch.empty((num_tokens, width), dtype=dtype, device=positions_T.device) for _ in range(2))
    beyond_T, beyond_frequencies_R, beyond_factor = beyond or (None, None, 1.0)
    launch(
        _cos_sin,
        (triton.cdiv(num_tokens * width, _ANGLES),),
        positions_T,
        frequencies_R,
        beyond_T,
        beyond_frequencies_R,
        cos_TR,
        sin_TR,
        num_tokens * width,
        factor,
        beyond_factor,
        R=width,
        BLOCK=_ANGLES,
        num_warps=4,
    )
    return cos_TR, sin_TR


def rope_and_write(
    qkv_TAD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Tensor,
    rotation: Rotation | None,
    norm: HeadNorm | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """See `reference.rope_and_write`; the heads of a token are contiguous, and so are the caches."""
    num_tokens, num_all, width = qkv_TAD.shape
    num_kv_heads, page = k_cache.shape[1:3]
    num_heads = num_all - 2 * num_kv_heads
    q_THD = torch.empty((num_tokens, num_heads, width), dtype=qkv_TAD.dtype, device=qkv_TAD.device)
    cos, sin, in_pairs = rotation or (None, None, False)
    rotated = 0 if cos is None else cos.shape[-1]
    most_heads = triton.next_power_of_2(max(num_heads, num_kv_heads))
    heads = min(most_heads, max(1, _TILE // triton.next_power_of_2(width)))
    num_q_parts, num_kv_parts = triton.cdiv(num_heads, heads), triton.cdiv(num_kv_heads, heads)
    launch(
        _rope_and_write,
        (num_tokens, num_q_parts + 2 * num_kv_parts),
        qkv_TAD,
        k_cache,
        v_cache,
        slots_T,
        cos,
        sin,
        None if norm is None else norm.weight_BD,
        q_THD,
        qkv_TAD.stride(0),
        0.0 if norm is None else norm.eps,
        k_scale,
        v_scale,
        H=num_heads,
        K=num_kv_heads,
        D=width,
        R=rotated,
        PAGE=page,
        IN_PAIRS=in_pairs,
        FP8=k_cache.dtype == torch.float8_e4m3fn,
        HEADS=heads,
        PAIRS=triton.next_power_of_2(max(1, rotated // 2)),
        REST=triton.next_power_of_2(max(1, width - rotated)),
        WIDTH=triton.next_power_of_2(width),
        num_warps=4,
    )
    return q_THD


def rope_and_write_latent(
    q_THD: Tensor,
    down_TW: Tensor,
    cache: Tensor,
    slots_T: Tensor,
    rotation: Rotation,
    weight_C: Tensor,
    eps: float,
    scale: float = 1.0,
) -> None:
    """See `reference.rope_and_write_latent`; the heads of a token's queries are contiguous."""
    num_tokens, num_heads, head_dim = q_THD.shape
    width, latent_dim = rotation.cos_TR.shape[-1], len(weight_C)
    pairs = triton.next_power_of_2(width // 2)
    heads = min(triton.next_power_of_2(num_heads), max(1, _TILE // (2 * pairs)))
    launch(
        _rope_and_write_latent,
        (num_tokens, 1 + triton.cdiv(num_heads, heads)),
        q_THD,
        down_TW,
        cache,
        slots_T,
        rotation.cos_TR,
        rotation.sin_TR,
        weight_C,
        q_THD.stride(0),
        down_TW.stride(0),
        eps,
        scale,
        H=num_heads,
        D=head_dim,
        C=latent_dim,
        R=width,
        IN_PAIRS=rotation.in_pairs,
        FP8=cache.dtype == torch.float8_e4m3fn,
        HEADS=heads,
        PAIRS=pairs,
        LATENT=triton.next_power_of_2(latent_dim),
        num_warps=4,
    )


@triton.jit(do_not_specialize=("num_angles",))  # it varies from step to step
def _cos_sin(
    positions_ptr,
    frequencies_ptr,
    beyond_ptr,
    beyond_frequencies_ptr,
    cos_ptr,
    sin_ptr,
    num_angles,
    factor,
    beyond_factor,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_angles
    token, channel = at // R, at % R
    frequency = tl.load(frequencies_ptr + channel, mask=mask, other=0.0)
    if beyond_ptr is not None:
        is_beyond = tl.load(beyond_ptr + token, mask=mask, other=0) != 0
        frequency = tl.where(is_beyond, tl.load(beyond_frequencies_ptr + channel, mask=mask, other=0.0), frequency)
        factor = tl.where(is_beyond, beyond_factor, factor)
    angle = tl.load(positions_ptr + token, mask=mask, other=0).to(tl.float32) * frequency
    # Quarter turns are taken off in float64: what is left is exact, however far a token stands, and small enough for
    # short polynomials (Cephes).
    quarters = tl.floor(angle.to(tl.float64) * 0.6366197723675814 + 0.5)
    rest = (angle.to(tl.float64) - quarters * 1.5707963267948966).to(tl.float32)
    square = rest * rest
    sin = rest + rest * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    cos = 4.166664568298827e-2 - square * (1.388731625493765e-3 - square * 2.443315711809948e-5)
    cos = 1.0 - 0.5 * square + square * square * cos
    quarter = quarters.to(tl.int64) & 3
    is_swapped = quarter % 2 == 1
    turned_cos = tl.where(is_swapped, sin, cos) * tl.where((quarter == 1) | (quarter == 2), -1.0, 1.0)
    turned_sin = tl.where(is_swapped, cos, sin) * tl.where(quarter >= 2, -1.0, 1.0)
    tl.store(cos_ptr + at, (turned_cos * factor).to(cos_ptr.dtype.element_ty), mask=mask)
    tl.store(sin_ptr + at, (turned_sin * factor).to(sin_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=("slots_ptr",))  # a KV group's row of an odd number of tokens
def _rope_and_write(
    qkv_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    cos_ptr,
    sin_ptr,
    norm_weight_ptr,
    q_ptr,
    stride_token,
    eps,
    k_scale,
    v_scale,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    FP8: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One token's queries, keys or values of `HEADS` heads."""
    q_parts: tl.constexpr = (H + HEADS - 1) // HEADS
    kv_parts: tl.constexpr = (K + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    x_ptr = qkv_ptr + token * stride_token
    slot = tl.load(slots_ptr + token)
    num_written = tl.where(slot >= 0, K, 0)
    place = slot // PAGE * (K * PAGE * D) + slot % PAGE * D
    turn_cos_ptr = cos_ptr if R == 0 else cos_ptr + token * R
    turn_sin_ptr = sin_ptr if R == 0 else sin_ptr + token * R
    if part < q_parts:
        head = part * HEADS + tl.arange(0, HEADS)[:, None]
        weight_ptr = None if norm_weight_ptr is None else norm_weight_ptr + head * D
        out_ptr = q_ptr + (token * H + head) * D
        _rotate_heads(
            x_ptr + head * D, out_ptr, head < H, weight_ptr, eps, turn_cos_ptr, turn_sin_ptr, 1.0,
            D, R, IN_PAIRS, False, HEADS, PAIRS, REST,
        )  # fmt: skip
    elif part < q_parts + kv_parts:
        head = (part - q_parts) * HEADS + tl.arange(0, HEADS)[:, None]
        weight_ptr = None if norm_weight_ptr is None else norm_weight_ptr + (H + head) * D
        out_ptr = k_cache_ptr + place + head * (PAGE * D)
        _rotate_heads(
            x_ptr + (H + head) * D, out_ptr, head < num_written, weight_ptr, eps, turn_cos_ptr, turn_sin_ptr,
            k_scale, D, R, IN_PAIRS, FP8, HEADS, PAIRS, REST,
        )  # fmt: skip
    else:
        head = (part - q_parts - kv_parts) * HEADS + tl.arange(0, HEADS)[:, None]
        channel = tl.arange(0, WIDTH)[None, :]
        mask = (head < num_written) & (channel < D)
        values = tl.load(x_ptr + (H + K + head) * D + channel, mask=mask, other=0.0).to(tl.float32)
        store_rounded(values, v_cache_ptr + place + head * (PAGE * D) + channel, mask, v_scale, FP8)


@triton.jit(do_not_specialize_on_alignment=("slots_ptr",))
def _rope_and_write_latent(
    q_ptr,
    down_ptr,
    cache_ptr,
    slots_ptr,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    q_stride_token,
    down_stride_token,
    eps,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    FP8: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    LATENT: tl.constexpr,
):
    """One token's latent with its key, or its queries of `HEADS` heads."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    cos_ptr += token * R
    sin_ptr += token * R
    if part == 0:
        slot = tl.load(slots_ptr + token)
        x_ptr = down_ptr + token * down_stride_token
        place = cache_ptr + slot * (C + R)
        channel = tl.arange(0, LATENT)
        x = tl.load(x_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
        normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / C + eps) * weight
        store_rounded(normed, place + channel, channel < tl.where(slot >= 0, C, 0), scale, FP8)
        key = tl.arange(0, 1)[:, None]
        mask = key < tl.where(slot >= 0, 1, 0)
        _rotate_heads(
            x_ptr + C + key, place + C + key, mask, None, eps, cos_ptr, sin_ptr, scale,
            R, R, IN_PAIRS, FP8, 1, PAIRS, 1,
        )  # fmt: skip
    else:
        head = (part - 1) * HEADS + tl.arange(0, HEADS)[:, None]
        heads_ptr = q_ptr + token * q_stride_token + head * D + (D - R)
        _rotate_heads(
            heads_ptr, heads_ptr, head < H, None, eps, cos_ptr, sin_ptr, 1.0,
            R, R, IN_PAIRS, False, HEADS, PAIRS, 1,
        )  # fmt: skip


@triton.jit
def _rotate_heads(
    x_ptr, out_ptr, mask, weight_ptr, eps, cos_ptr, sin_ptr, scale,
    D: tl.constexpr, R: tl.constexpr, IN_PAIRS: tl.constexpr, FP8: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Heads at the pointers `x_ptr` (a column), normed and rotated, to those at `out_ptr`, which may be the same."""
    left, right, rest = _load_heads(x_ptr, mask, D, R, IN_PAIRS, HEADS, PAIRS, REST)
    if weight_ptr is not None:
        squares = tl.sum(left * left + right * right, axis=1, keep_dims=True)
        squares += tl.sum(rest * rest, axis=1, keep_dims=True)
        factor = tl.rsqrt(squares / D + eps)
        left_weight, right_weight, rest_weight = _load_heads(weight_ptr, mask, D, R, IN_PAIRS, HEADS, PAIRS, REST)
        left, right, rest = left * factor * left_weight, right * factor * right_weight, rest * factor * rest_weight
    pair = tl.arange(0, PAIRS)[None, :]
    half: tl.constexpr = R // 2
    if R > 0:
        cos = tl.load(cos_ptr + pair, mask=pair < half, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + pair, mask=pair < half, other=0.0).to(tl.float32)
        left, right = left * cos - right * sin, right * cos + left * sin
    tl.debug_barrier()  # all is read before anything is written
    if R < D:
        rest_at = tl.arange(0, REST)[None, :]
        store_rounded(rest, out_ptr + R + rest_at, mask & (rest_at < D - R), scale, FP8)
    if IN_PAIRS:
        both_at = tl.arange(0, 2 * PAIRS)[None, :]
        store_rounded(tl.interleave(left, right), out_ptr + both_at, mask & (both_at < R), scale, FP8)
    elif R > 0:
        store_rounded(left, out_ptr + pair, mask & (pair < half), scale, FP8)
        store_rounded(right, out_ptr + half + pair, mask & (pair < half), scale, FP8)


@triton.jit
def _load_heads(
    x_ptr, mask, D: tl.constexpr, R: tl.constexpr, IN_PAIRS: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """(left, right, rest) in float32: both channels of each pair that turns together, and those that do not turn."""
    rest_at = tl.arange(0, REST)[None, :]
    rest = tl.load(x_ptr + R + rest_at, mask=mask & (rest_at < D - R), other=0.0).to(tl.float32)
    if IN_PAIRS:
        both_at = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.load(x_ptr + both_at, mask=mask & (both_at < R), other=0.0).to(tl.float32)
        left, right = tl.split(tl.reshape(both, (HEADS, PAIRS, 2)))
    else:
        half: tl.constexpr = R // 2
        pair = tl.arange(0, PAIRS)[None, :]
        left = tl.load(x_ptr + pair, mask=mask & (pair < half), other=0.0).to(tl.float32)
        right = tl.load(x_ptr + half + pair, mask=mask & (pair < half), other=0.0).to(tl.float32)
    return left, right, rest
