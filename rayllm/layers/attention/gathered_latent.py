"""Latent attention by torch, for the gathered backend: absorbed, or expanded to keys and values.

Per head, T queries and L keys, in multiplications: absorbing the projections costs T * C * (N + V) and the attention
then T * L * (2 * C + R); expanding costs L * C * (N + V) and the attention T * L * (D + V). With DeepSeek-V2's widths
(512 latent, 128 + 64 key, 128 value) a decode row is cheaper absorbed, a whole prompt expanded, and a chunk expanded
from about 170 * (1 - T / L) tokens on.

Shape letters: B rows, T query tokens of a row, L keys of a row, H query heads, h heads of a slice of them. Others: see
`backend.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rayllm.layers.attention.backend import LatentLayerAttention
from rayllm.spec import LatentAttentionSpec
from rayllm_kernels.latent_attention import gathered_latent_decode, latent_attention

_EXPANDED_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
"""Keys and values that are expanded at once: heads are taken in slices of as many as fit."""


def decode(
    q_BHD: Tensor, cache: Tensor, pages: Tensor, mask_B1L: Tensor, workspace: Tensor, layer: LatentLayerAttention
) -> Tensor:
    """One query token for each row whose latents stand in `pages` of the cache; `[B, H, V]`."""
    q_BHW, spec = _absorbed_queries(q_BHD, layer), layer.spec
    out_BHC = gathered_latent_decode(q_BHW, cache, pages, mask_B1L, spec.scale, spec.latent_dim, workspace)
    return layer.v_up(out_BHC)


def chunk(q_THD: Tensor, latent_LW: Tensor, mask_TL: Tensor, layer: LatentLayerAttention) -> Tensor:
    """Several query tokens of one row with these latents; `[T, H, V]`."""
    if expanding_is_cheaper(len(q_THD), len(latent_LW), layer.spec):
        return expanded(q_THD.unsqueeze(0), latent_LW.unsqueeze(0), mask_TL, layer)
    return absorbed(q_THD, latent_LW, mask_TL, layer)


def expanding_is_cheaper(num_queries: int, num_keys: int, spec: LatentAttentionSpec) -> bool:
    """By multiplications; see above."""
    more_projection = (num_keys - num_queries) * spec.latent_dim * (spec.nope_dim + spec.value_dim)
    less_attention = num_queries * num_keys * (spec.kv_dim + spec.latent_dim - spec.qk_dim - spec.value_dim)
    return more_projection < less_attention


def absorbed(q_THD: Tensor, latent_LW: Tensor, mask_TL: Tensor, layer: LatentLayerAttention) -> Tensor:
    """`chunk` in the latent space: each token is a row of its own over the same latents."""
    q_THW, spec = _absorbed_queries(q_THD, layer), layer.spec
    latent_TLW = latent_LW.expand(q_THD.shape[0], -1, -1)
    return layer.v_up(latent_attention(q_THW, latent_TLW, mask_TL.unsqueeze(1), spec.scale, spec.latent_dim))


def expanded(q_BTHD: Tensor, latent_BLW: Tensor, mask_TL: Tensor | None, layer: LatentLayerAttention) -> Tensor:
    """Attention with keys and values of each head, a slice of heads at a time; `[B * T, H, V]`. Without a mask it is
    causal, T = L."""
    num_rows, num_tokens, num_heads, qk_dim = q_BTHD.shape
    head_bytes = num_rows * latent_BLW.shape[1] * 2 * qk_dim * q_BTHD.element_size()
    step = max(1, _EXPANDED_BYTES.get(q_BTHD.device.type, _EXPANDED_BYTES["cpu"]) // head_bytes)
    out_BTHV = q_BTHD.new_empty(num_rows, num_tokens, num_heads, layer.spec.value_dim)
    for start in range(0, num_heads, step):
        heads = range(start, min(start + step, num_heads))
        k_BhLD, v_BhLD = _keys_and_values(latent_BLW, heads, layer)
        out_BhTD = F.scaled_dot_product_attention(
            q_BTHD[:, :, start : heads.stop].transpose(1, 2),
            k_BhLD,
            v_BhLD,
            attn_mask=mask_TL,
            is_causal=mask_TL is None,
            scale=layer.spec.scale,
        )
        out_BTHV[:, :, start : heads.stop] = out_BhTD[..., : layer.spec.value_dim].transpose(1, 2)
    return out_BTHV.flatten(0, 1)


def _absorbed_queries(q_THD: Tensor, layer: LatentLayerAttention) -> Tensor:
    """Queries in the latent space, their rotated channels behind: `[T, H, W]`."""
    nope_dim = layer.spec.nope_dim
    return torch.cat((layer.absorb(q_THD[..., :nope_dim]), q_THD[..., nope_dim:]), dim=-1)


def _keys_and_values(latent_BLW: Tensor, heads: range, layer: LatentLayerAttention) -> tuple[Tensor, Tensor]:
    """Of these heads, `[B, h, L, D]` each: values have zeros behind, for the fused kernel of a CPU, which is 2 to 3
    times as fast where they are as wide as keys."""
    spec = layer.spec
    num_rows, num_keys = latent_BLW.shape[:2]
    latents = latent_BLW[..., : spec.latent_dim].reshape(num_rows * num_keys, -1)
    k = latents.new_empty(len(heads), num_rows * num_keys, spec.qk_dim)
    v = latents.new_zeros(len(heads), num_rows * num_keys, max(spec.qk_dim, spec.value_dim))
    layer.k_up.of_shared(latents, heads, k[..., : spec.nope_dim])
    layer.v_up.of_shared(latents, heads, v[..., : spec.value_dim])
    k[..., spec.nope_dim :] = latent_BLW[..., spec.latent_dim :].reshape(num_rows * num_keys, -1)
    k, v = (x.view(len(heads), num_rows, num_keys, -1).transpose(0, 1) for x in (k, v))
    return k, v
