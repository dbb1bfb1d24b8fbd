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
    k_TKD: Tensor,
    v_TKD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Tensor,
    rows: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Copies each token's key and value into its slot of the caches `[blocks, K, P, D]`; other slots stay as they are.

    `rows`, if given, is `page_rows(slots_T, ...)`, computed once for all layers of a step. On a GPU a token whose slot
    is below 0 is left out. Caches of float8_e4m3fn hold key / `k_scale` and value / `v_scale`, at most 448 in size.
    """
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    if rows is None:
        rows = page_rows(slots_T, num_kv_heads, block_size)
    _write_rows(k_TKD.reshape(-1, head_dim), k_cache, rows, k_scale)
    _write_rows(v_TKD.reshape(-1, head_dim), v_cache, rows, v_scale)


def write_latent(latent_TW: Tensor, cache: Tensor, slots_T: Tensor, scale: float = 1.0) -> None:
    """Copies each token's vector into its slot of a cache of one head, `[blocks, 1, P, W]`, as `write_kv` does."""
    _write_rows(latent_TW, cache, slots_T, scale)


def _write_rows(x_ND: Tensor, cache: Tensor, rows_N: Tensor, scale: float) -> None:
    if cache.dtype == torch.float8_e4m3fn:  # as bytes, which torch can copy to places
        x_ND = (x_ND.float() / scale).clamp(-448, 448).to(cache.dtype).view(torch.uint8)
        cache = cache.view(torch.uint8)
    cache.view(-1, cache.shape[-1]).index_copy_(0, rows_N, x_ND)
