"""Latent attention in its absorbed form (DeepSeek-V2, 2024): queries were brought into the latent space, so all heads
attend to one vector a token, whose first channels are the value.

Shape letters: B query tokens, H query heads, P page size, L key length, W width of what is kept of a token, C width of
its latent part (C <= W; channels past C are the rotated key that all heads share).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rayllm_kernels.attention.gathered import gather_pages


def gathered_latent_decode(
    q_BHW: Tensor, cache: Tensor, pages: Tensor, mask_B1L: Tensor, scale: float, latent_dim: int, workspace: Tensor
) -> Tensor:
    """One query token for each of B rows; returns `[B, H, C]`, weighted sums of latents.

    `cache` is `[blocks, 1, P, W]`; `pages` (`B * pages of a row`, block numbers) are gathered into `workspace`, a flat
    buffer. `mask_B1L` is added to the scores: -inf where there is no key.
    """
    num_rows, _, length = mask_B1L.shape
    kv_BLW = gather_pages(cache, pages, workspace).view(num_rows, length, -1)
    return latent_attention(q_BHW, kv_BLW, mask_B1L, scale, latent_dim)


def latent_attention(q_BHW: Tensor, kv_BLW: Tensor, mask_B1L: Tensor, scale: float, latent_dim: int) -> Tensor:
    """softmax(q @ kv.T * scale + mask) @ kv, cut to the latent channels: `[B, H, C]`. Rows may share the same latents
    (a stride of 0); they are not copied.

    A CPU has a fused kernel, in bfloat16 3 times as fast as plain products, where the heads are given as query rows of
    one head and the whole vectors as values, as wide as keys. A GPU's fused kernels do not reach this width.
    """
    if not q_BHW.is_cpu:
        return plain_latent_attention(q_BHW, kv_BLW, mask_B1L, scale, latent_dim)
    kv = kv_BLW.unsqueeze(1)
    out = F.scaled_dot_product_attention(q_BHW.unsqueeze(1), kv, kv, attn_mask=mask_B1L.unsqueeze(1), scale=scale)
    return out.squeeze(1)[..., :latent_dim]


def plain_latent_attention(q_BHW: Tensor, kv_BLW: Tensor, mask_B1L: Tensor, scale: float, latent_dim: int) -> Tensor:
    """`latent_attention` by plain products."""
    scores_BHL = torch.baddbmm(mask_B1L, q_BHW, kv_BLW.transpose(1, 2), alpha=scale)
    return torch.bmm(scores_BHL.softmax(-1), kv_BLW[..., :latent_dim])
