"""Attention over paged keys and values."""

from __future__ import annotations

from torch import Tensor

from rayllm_kernels.attention import reference
from rayllm_kernels.attention.gathered import attend, gather_pages, gathered_chunk, gathered_decode, prompt_attention
from rayllm_kernels.attention.paged import PagedLines, Scoring, refusal_of_kernels
from rayllm_kernels.device import uses_triton

__all__ = [
    "PagedLines",
    "Scoring",
    "attend",
    "gather_pages",
    "gathered_chunk",
    "gathered_decode",
    "paged_decode",
    "paged_prefill",
    "prompt_attention",
    "refusal_of_kernels",
]


def paged_decode(
    q_NHD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lines: PagedLines,
    scoring: Scoring,
    arrivals: Tensor,
    out_NHD: Tensor,
) -> None:
    """See `reference.paged_decode`."""
    if uses_triton(q_NHD):
        from rayllm_kernels.attention import triton

        triton.paged_decode(q_NHD, k_cache, v_cache, lines, scoring, arrivals, out_NHD)
    else:
        reference.paged_decode(q_NHD, k_cache, v_cache, lines, scoring, arrivals, out_NHD)


def paged_prefill(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, lines: PagedLines, scoring: Scoring, out_THD: Tensor
) -> None:
    """See `reference.paged_prefill`."""
    if uses_triton(q_THD):
        from rayllm_kernels.attention import triton

        triton.paged_prefill(q_THD, k_cache, v_cache, lines, scoring, out_THD)
    else:
        reference.paged_prefill(q_THD, k_cache, v_cache, lines, scoring, out_THD)
