"""Rotary position embedding (Su et al., 2021). Shape letters: T tokens, H heads, D head width, R rotated width (R <= D;
channels past R pass through unchanged). Of a layer's projections: A heads of queries, keys and values, B of queries and
keys, K of keys. Of latent attention: C width of a latent, W = C + R.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rayllm_kernels.kv_cache.reference import write_kv, write_latent
from rayllm_kernels.norm.reference import rms_norm


class Rotation(NamedTuple):
    """How a step's tokens turn in the layers of one rope."""

    cos_TR: Tensor
    sin_TR: Tensor
    in_pairs: bool = False
    """Neighbouring channels turn together, else those R / 2 apart."""


class HeadNorm(NamedTuple):
    """The root-mean-square norm of each head of queries and keys."""

    weight_BD: Tensor
    eps: float


def cos_sin(
    positions_T: Tensor,
    frequencies_R: Tensor,
    factor: float,
    dtype: torch.dtype,
    beyond: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """(cos_TR, sin_TR) of position * frequency, times `factor`, computed in float32 and rounded to `dtype`.

    `frequencies_R` (float32) holds the R / 2 frequencies twice. `beyond` = (beyond_T, frequencies_R, factor): tokens of
    which `beyond_T` (bool) is true turn by those frequencies and that factor.
    """
    if beyond is not None:
        beyond_T, other_frequencies_R, other_factor = beyond
        cos_TR, sin_TR = cos_sin(positions_T, frequencies_R, factor, dtype)
        other_cos_TR, other_sin_TR = cos_sin(positions_T, other_frequencies_R, other_factor, dtype)
        beyond_T1 = beyond_T.unsqueeze(1)
        return torch.where(beyond_T1, other_cos_TR, cos_TR), torch.where(beyond_T1, other_sin_TR, sin_TR)
    angles_TR = positions_T.float().unsqueeze(1) * frequencies_R
    cos_TR, sin_TR = angles_TR.cos(), angles_TR.sin()
    if factor != 1.0:
        cos_TR, sin_TR = cos_TR * factor, sin_TR * factor
    return cos_TR.to(dtype), sin_TR.to(dtype)


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
    """Everything between a layer's projections and its attention. Returns the queries, `[T, H, D]` and contiguous.

    Of the A = H + 2 K heads of a token the first H are queries, then come K keys and K values. Queries and keys are
    normed and rotated, where there is a norm or a rotation. Keys and values go to their slots of the caches
    `[blocks, K, P, D]`; tokens whose slot is below 0 are not written. Caches of float8_e4m3fn hold key / `k_scale` and
    value / `v_scale`, at most 448 in size.
    """
    num_kv_heads = k_cache.shape[1]
    num_heads = qkv_TAD.shape[1] - 2 * num_kv_heads
    qk_TBD, v_TKD = qkv_TAD[:, : num_heads + num_kv_heads], qkv_TAD[:, num_heads + num_kv_heads :]
    if norm is not None:
        qk_TBD = rms_norm(qk_TBD, *norm)
    if rotation is not None:
        qk_TBD = rope(qk_TBD, *rotation)
    kept_T = slots_T >= 0
    k_TKD, v_TKD = qk_TBD[kept_T, num_heads:], v_TKD[kept_T]
    write_kv(k_TKD, v_TKD, k_cache, v_cache, slots_T[kept_T], None, k_scale, v_scale)
    return qk_TBD[:, :num_heads].contiguous()


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
    """`rope_and_write` of latent attention: the last R channels of a query's heads are rotated in place; of `down_TW`
    the first C channels, the latent, are normed and the last R, the key of all heads, rotated, and both go to the
    token's slot of the cache `[blocks, 1, P, W]`."""
    width, latent_dim = rotation.cos_TR.shape[-1], len(weight_C)
    q_THD[..., -width:] = rope(q_THD[..., -width:], *rotation)
    key_TR = rope(down_TW[:, latent_dim:].unsqueeze(1), *rotation).squeeze(1)
    latent_TW = torch.cat((rms_norm(down_TW[:, :latent_dim], weight_C, eps), key_TR), dim=-1)
    kept_T = slots_T >= 0
    write_latent(latent_TW[kept_T], cache, slots_T[kept_T], scale)


def rope(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, in_pairs: bool = False) -> Tensor:
    """Rotates channels i and i + R/2 of every head by the angle of its token; with `in_pairs`, channels 2i and 2i + 1.

    `cos_TR` and `sin_TR` hold the R/2 angles twice (both halves alike), in the dtype of `x_THD`. Returns a new tensor.
    """
    width = cos_TR.shape[-1]
    if in_pairs:
        return _in_pairs(x_THD, cos_TR[:, : width // 2], sin_TR[:, : width // 2])
    half = width // 2
    cos, sin = cos_TR.unsqueeze(1), sin_TR[:, :half].unsqueeze(1)
    left, right = x_THD[..., :half], x_THD[..., half:width]
    if width == x_THD.shape[-1]:
        out = x_THD * cos
    else:
        out = torch.cat((x_THD[..., :width] * cos, x_THD[..., width:]), dim=-1)
    out[..., :half].addcmul_(right, sin, value=-1)
    out[..., half:width].addcmul_(left, sin)
    return out


def _in_pairs(x_THD: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """P = R / 2 pairs of neighbouring channels."""
    width = 2 * cos_TP.shape[-1]
    cos, sin = cos_TP.unsqueeze(1), sin_TP.unsqueeze(1)
    out = x_THD.clone()
    left, right = x_THD[..., 0:width:2], x_THD[..., 1:width:2]
    out[..., 0:width:2] = left * cos - right * sin
    out[..., 1:width:2] = right * cos + left * sin
    return out
