"""Attention over paged keys and values."""

from rayllm_kernels.attention.reference import attend, gather_pages, paged_decode, paged_prefill, prompt_attention

__all__ = ["attend", "gather_pages", "paged_decode", "paged_prefill", "prompt_attention"]
