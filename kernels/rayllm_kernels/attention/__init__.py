"""Attention over paged keys and values."""

from rayllm_kernels.attention.gathered import attend, gather_pages, gathered_chunk, gathered_decode, prompt_attention
from rayllm_kernels.attention.paged import PagedLines, Scoring
from rayllm_kernels.attention.reference import paged_decode, paged_prefill

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
]
