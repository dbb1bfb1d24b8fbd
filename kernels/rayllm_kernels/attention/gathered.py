"""Attention over paged keys and values that are gathered first, by products of torch: the CPU path.

Shape letters: B rows (sequences), T query tokens of a row, H query heads, K key/value heads, G = H / K heads that share
one, P page size, L key length, D head width.

Pages are `[blocks, K, P, D]`. Seen as `[blocks * K, P * D]`, one `index_select` over `block * K + head` lays a row's
pages side by side as `[K, L, D]`: no transposition, no copy per head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gather_pages(cache: Tensor, pages: Tensor, out: Tensor) -> Tensor:
    """The chosen pages of `cache` (block * K + head) one after another, in `out`, a flat buffer large enough."""
    width = cache.shape[2] * cache.shape[3]
    gathered = out[: pages.numel() * width].view(pages.numel(), width)
    torch.index_select(cache.view(-1, width), 0, pages, out=gathered)
    return gathered


def gathered_decode(
    q_BHD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pages: Tensor,
    mask_NGL: Tensor,
    scale: float,
    workspace: Tensor,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """One query token for each of B rows; returns `[B, H, D]`.

    `pages` (`B * K * pages of a row`, block * K + head) are gathered into `workspace`, a flat buffer `[2, n]`.
    `mask_NGL`, a line for each row and key/value head (N = B * K) and each query head of it, or one for all of them, is
    added to the scores: -inf where there is no key. `soft_cap` and `sinks_H`: see `attend`.
    The heads that share a key/value head are given to the products as their query rows. Three plain products: for one
    token a row in bfloat16 they are 2 to 3 times as fast as the fused CPU kernel.
    """
    num_rows, num_heads, head_dim = q_BHD.shape
    num_lines, _, length = mask_NGL.shape
    k_NLD = gather_pages(k_cache, pages, workspace[0]).view(num_lines, length, head_dim)
    v_NLD = gather_pages(v_cache, pages, workspace[1]).view(num_lines, length, head_dim)
    q_NGD = q_BHD.reshape(num_lines, -1, head_dim)
    if soft_cap is None and sinks_H is None:
        scores_NGL = torch.baddbmm(mask_NGL, q_NGD, k_NLD.transpose(1, 2), alpha=scale)
        out_NGD = torch.bmm(scores_NGL.softmax(-1), v_NLD)
    else:
        sinks_NG1 = None if sinks_H is None else sinks_H.repeat(num_rows).view(num_lines, -1, 1)
        out_NGD = attend(q_NGD, k_NLD, v_NLD, mask_NGL, scale, soft_cap, sinks_NG1)
    return out_NGD.view(num_rows, num_heads, head_dim)


def gathered_chunk(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pages: Tensor,
    kv_len: int,
    mask_TL: Tensor,
    scale: float,
    workspace: Tensor,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """A chunk of one row whose earlier keys are in its pages (its own are written already); returns `[T, H, D]`.

    `pages` (`K * pages of the row`) and `workspace` as for `gathered_decode`; `mask_TL` (or `[K, G, T, L]`, where heads
    differ) is added to the scores. `soft_cap` and `sinks_H`: see `attend`.
    """
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads = k_cache.shape[1]
    group = num_heads // num_kv_heads
    k = gather_pages(k_cache, pages, workspace[0]).view(num_kv_heads, 1, -1, head_dim)[:, :, :kv_len]
    v = gather_pages(v_cache, pages, workspace[1]).view(num_kv_heads, 1, -1, head_dim)[:, :, :kv_len]
    q_KGTD = q_THD.view(num_tokens, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    if soft_cap is None and sinks_H is None:
        out = F.scaled_dot_product_attention(
            q_KGTD, k.expand(-1, group, -1, -1), v.expand(-1, group, -1, -1), attn_mask=mask_TL, scale=scale
        )
    else:
        sinks = None if sinks_H is None else sinks_H.view(num_kv_heads, group, 1, 1)
        out = attend(q_KGTD, k, v, mask_TL, scale, soft_cap, sinks)
    return out.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)


def prompt_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    num_rows: int,
    mask_TT: Tensor | None,
    scale: float,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Causal attention of `num_rows` whole prompts of equal length that stand one after another; `[T, H, D]`.

    Nothing is read from pages. `mask_TT` (one prompt's length squared, or `[K, G, T, T]` where heads differ) is added
    to the scores, in place of the causal mask. `soft_cap` and `sinks_H`: see `attend`.
    """
    num_heads, head_dim = q_THD.shape[1:]
    num_kv_heads = k_TKD.shape[1]
    group = num_heads // num_kv_heads
    length = q_THD.shape[0] // num_rows
    batch = num_rows * num_kv_heads
    q = q_THD.reshape(num_rows, length, num_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    q = q.reshape(batch, group, length, head_dim)
    k, v = (
        x.reshape(num_rows, length, num_kv_heads, head_dim).transpose(1, 2).reshape(batch, 1, length, head_dim)
        for x in (k_TKD, v_TKD)
    )
    if mask_TT is not None and mask_TT.dim() == 4:
        mask_TT = mask_TT.repeat(num_rows, 1, 1, 1)
    if soft_cap is None and sinks_H is None:
        out = F.scaled_dot_product_attention(
            q,
            k.expand(-1, group, -1, -1),
            v.expand(-1, group, -1, -1),
            attn_mask=mask_TT,
            is_causal=mask_TT is None,
            scale=scale,
        )
    else:
        if mask_TT is None:
            mask_TT = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
        sinks = None if sinks_H is None else sinks_H.repeat(num_rows).view(batch, group, 1, 1)
        out = attend(q, k, v, mask_TT, scale, soft_cap, sinks)
    out = out.view(num_rows, num_kv_heads, group, length, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(num_rows * length, num_heads, head_dim)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, soft_cap: float | None, sinks: Tensor | None
) -> Tensor:
    """softmax(soft_cap(q @ k.T * scale) + mask) @ v over the last two dimensions, scores and weights in float32.

    `soft_cap` c turns a score s into c * tanh(s / c) (Gemma 2). `sinks`, broadcast to the scores without their last
    dimension, are one more score in each softmax's sum, which has no value (gpt-oss).
    """
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if soft_cap is not None:
        scores = (scores / soft_cap).tanh_() * soft_cap
    scores += mask
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        highest = torch.maximum(scores.amax(-1, keepdim=True), sinks)
        weights = (scores - highest).exp_()
        weights /= weights.sum(-1, keepdim=True) + (sinks - highest).exp()
    return weights.to(v.dtype) @ v
