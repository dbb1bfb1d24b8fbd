"""Attention over paged keys and values, one line after another. Shape letters: N lines (sequences), T query tokens,
H query heads, K key/value heads, G = H / K heads that share one, P page size, L key length, D head width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from rayllm_kernels.attention.paged import PagedLines, Scoring


def paged_decode(
    q_NHD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lines: PagedLines,
    scoring: Scoring,
    arrivals: Tensor,
    out_NHD: Tensor,
) -> None:
    """Attention of one query a line, the last of its tokens, to keys and values in `[blocks, K, P, D]` caches; written
    to `out_NHD`, with zeros for lines without keys.

    `arrivals`, int32 zeros that are zeros again afterwards, count the parts of a line that are finished where several
    programs share one; calls that may run at the same time need some of their own.
    """
    for line, kv_len in enumerate(lines.kv_lens_N.tolist()):
        out_NHD[line] = 0
        if kv_len:
            out_NHD[line] = attend_line(q_NHD[line].unsqueeze(0), k_cache, v_cache, lines, line, scoring).squeeze(0)


def paged_prefill(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, lines: PagedLines, scoring: Scoring, out_THD: Tensor
) -> None:
    """Causal attention of several queries a line, the last of its tokens, whose keys and values are in the caches;
    written to `out_THD`. Places that are no line's query stay as they are."""
    starts = [start - lines.first_query for start in lines.query_starts_N1.tolist()]
    for line, (begin, end) in enumerate(pairwise(starts)):
        if end > begin:
            out_THD[begin:end] = attend_line(q_THD[begin:end], k_cache, v_cache, lines, line, scoring)


def attend_line(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, lines: PagedLines, line: int, scoring: Scoring
) -> Tensor:
    """Attention of a line's last T tokens, in float32."""
    num_queries, num_heads, _ = q_THD.shape
    kv_len = int(lines.kv_lens_N[line])
    first = 0 if scoring.window is None else max(0, kv_len - num_queries - scoring.window + 1)
    positions_L = torch.arange(first, kv_len, device=q_THD.device)
    distances_TL = positions_L - torch.arange(kv_len - num_queries, kv_len, device=q_THD.device).unsqueeze(1)
    k_HLD, v_HLD = (
        _rows_of(cache, lines, line, positions_L, num_heads).float() * scale
        for cache, scale in ((k_cache, scoring.k_scale), (v_cache, scoring.v_scale))
    )
    scores_HTL = q_THD.float().transpose(0, 1) @ k_HLD.transpose(1, 2) * scoring.scale
    if scoring.soft_cap is not None:
        scores_HTL = scoring.soft_cap * (scores_HTL / scoring.soft_cap).tanh()
    if scoring.slopes_H is not None:
        scores_HTL = scores_HTL + scoring.slopes_H.view(-1, 1, 1) * distances_TL
    hidden_TL = distances_TL > 0
    if scoring.window is not None:
        hidden_TL |= distances_TL <= -scoring.window
    scores_HTL = scores_HTL.masked_fill(hidden_TL, float("-inf"))
    if scoring.sinks_H is not None:
        sinks_HT1 = scoring.sinks_H.view(-1, 1, 1).expand(-1, num_queries, 1)
        scores_HTL = torch.cat((scores_HTL, sinks_HT1), dim=2)
    weights_HTL = scores_HTL.softmax(dim=2)[:, :, : len(positions_L)]
    return (weights_HTL @ v_HLD).transpose(0, 1).to(q_THD.dtype)


def _rows_of(cache: Tensor, lines: PagedLines, line: int, positions_L: Tensor, num_heads: int) -> Tensor:
    """What the cache holds of a line at these positions, `[H, L, D]`."""
    page_size = cache.shape[2]
    blocks_L = lines.block_table_MB[lines.rows_N[line].long()][positions_L // page_size].long()
    rows_LKD = cache[blocks_L, :, positions_L % page_size]
    return rows_LKD.transpose(0, 1).repeat_interleave(num_heads // cache.shape[1], dim=0)
