"""Attention libraries that are not installed: modules of the same interface, which compute by RayLLM's reference.

Signatures: `flash_attn_with_kvcache` of FlashAttention 3 (hopper/flash_attn_interface.py), and
`BatchPrefillWithPagedKVCacheWrapper` of FlashInfer (docs.flashinfer.ai/api/attention.html).
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from rayllm_kernels.attention import PagedLines, Scoring, reference


def install(patch: pytest.MonkeyPatch, name: str, **members: Any) -> ModuleType:
    """A module of this name that holds `members`, until the test ends."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(members)
    patch.setitem(sys.modules, name, module)
    return module


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: None = None,
    v: None = None,
    *,
    cache_seqlens: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    assert causal
    assert window_size[1] == (-1 if window_size[0] == -1 else 0)
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in (cache_seqlens, page_table, cu_seqlens_q))
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1
    assert len(page_table) == len(cache_seqlens)
    lines = PagedLines(torch.arange(len(page_table)), cache_seqlens, page_table, cu_seqlens_q)
    scoring = Scoring(softmax_scale, None if window_size[0] == -1 else window_size[0] + 1, softcap or None)
    out = torch.full_like(q, torch.nan)
    reference.paged_prefill(q, k_cache.transpose(1, 2), v_cache.transpose(1, 2), lines, scoring, out)
    return out


class BatchPrefillWithPagedKVCacheWrapper:
    num_planned = 0

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD"):
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "HND"

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert causal
        assert sm_scale is not None
        assert q_data_type == kv_data_type
        assert {x.dtype for x in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)} == {
            torch.int32
        }
        BatchPrefillWithPagedKVCacheWrapper.num_planned += 1
        counts = paged_kv_indptr.diff()
        table = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32)
        for line, blocks in enumerate(paged_kv_indices.split(counts.tolist())):
            table[line, : len(blocks)] = blocks
        kv_lens = ((counts - 1) * page_size + paged_kv_last_page_len).int()
        self._shape = (num_qo_heads, num_kv_heads, page_size, head_dim_qk)
        self._lines = PagedLines(torch.arange(len(counts)), kv_lens, table, qo_indptr)
        self._scoring = Scoring(sm_scale, None if window_left == -1 else window_left + 1, logits_soft_cap)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        assert (q.shape[1], *paged_kv_cache[0].shape[1:]) == self._shape
        reference.paged_prefill(q, *paged_kv_cache, self._lines, self._scoring, out)
        return out
