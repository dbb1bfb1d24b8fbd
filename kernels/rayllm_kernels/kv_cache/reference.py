"""Keys and values into pages. Shape letters: T tokens, K key/value heads, P page (block) size, D head width."""

from __future__ import annotations

import torch
from torch import Tensor


def page_rows(slots_T: Tensor, num_kv_heads: int, block_size: int) -> Tensor:
    """Where each token and head stands in a cache `[blocks, K, P, D]` seen as rows of D: int64 `[T * K]`.

    A slot is block * block_size + offset.
    """
    block_T = torch.div(slots_T, block_size, rounding_mode="floor")
    offset_T = slots_T - block_T * block_size
    heads_K = torch.arange(num_kv_heads, device=slots_T.device)
    rows_TK = (block_T.unsqueeze(1) * num_kv_heads + heads_K) * block_size + offset_T.unsqueeze(1)
    return rows_TK.flatten()


def write_kv(
    k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, v_cache: Tensor, slots_T: Tensor, rows: Tensor | None = None
) -> None:
    """Copies each token's key and value into its slot of the caches `[blocks, K, P, D]`; other slots stay as they are.

    `rows`, if given, is `page_rows(slots_T, ...)`, computed once for all layers of a step.
    """
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    if rows is None:
        rows = page_rows(slots_T, num_kv_heads, block_size)
    k_cache.view(-1, head_dim).index_copy_(0, rows, k_TKD.reshape(-1, head_dim))
    v_cache.view(-1, head_dim).index_copy_(0, rows, v_TKD.reshape(-1, head_dim))


def write_latent(latent_TW: Tensor, cache: Tensor, slots_T: Tensor) -> None:
    """Copies each token's vector into its slot of a cache of one head, `[blocks, 1, P, W]`."""
    cache.view(-1, cache.shape[-1]).index_copy_(0, slots_T, latent_TW)
