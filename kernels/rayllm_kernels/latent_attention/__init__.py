"""Attention of all query heads over one compressed vector a token (latent attention), paged."""

from __future__ import annotations

from torch import Tensor

from rayllm_kernels.attention.paged import PagedLines
from rayllm_kernels.device import uses_triton
from rayllm_kernels.latent_attention import reference
from rayllm_kernels.latent_attention.gathered import gathered_latent_decode, latent_attention

__all__ = ["gathered_latent_decode", "latent_attention", "paged_latent_decode", "paged_latent_prefill"]


def paged_latent_decode(
    q_NHW: Tensor, cache: Tensor, lines: PagedLines, scale: float, arrivals: Tensor, out_NHC: Tensor
) -> None:
    """See `reference.paged_latent_decode`."""
    if uses_triton(q_NHW):
        from rayllm_kernels.latent_attention import triton

        triton.paged_latent_decode(q_NHW, cache, lines, scale, arrivals, out_NHC)
    else:
        reference.paged_latent_decode(q_NHW, cache, lines, scale, arrivals, out_NHC)


def paged_latent_prefill(q_THW: Tensor, cache: Tensor, lines: PagedLines, scale: float, out_THC: Tensor) -> None:
    """See `reference.paged_latent_prefill`."""
    if uses_triton(q_THW):
        from rayllm_kernels.latent_attention import triton

        triton.paged_latent_prefill(q_THW, cache, lines, scale, out_THC)
    else:
        reference.paged_latent_prefill(q_THW, cache, lines, scale, out_THC)
