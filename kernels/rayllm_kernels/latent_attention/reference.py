"""Latent attention in its absorbed form (DeepSeek-V2, 2024), over pages, one line after another: queries were brought
into the latent space, so all heads attend to one vector a token, whose first channels are the value.

Shape letters: N lines (sequences), T query tokens, H query heads, P page size, W width of what is kept of a token, C
width of its latent part (C <= W; channels past C are the rotated key that all heads share).
"""

from __future__ import annotations

from torch import Tensor

from rayllm_kernels.attention import reference
from rayllm_kernels.attention.paged import PagedLines, Scoring


def paged_latent_decode(
    q_NHW: Tensor, cache: Tensor, lines: PagedLines, scale: float, arrivals: Tensor, out_NHC: Tensor
) -> None:
    """Attention of one query a line, the last of its tokens, to the latents in a `[blocks, 1, P, W]` cache; weighted
    sums of latents are written to `out_NHC`, zeros for lines without keys. `arrivals`: see `attention.reference`."""
    out_NHW = q_NHW.new_empty(q_NHW.shape)
    reference.paged_decode(q_NHW, cache, cache, lines, Scoring(scale), arrivals, out_NHW)
    out_NHC.copy_(out_NHW[..., : out_NHC.shape[2]])


def paged_latent_prefill(q_THW: Tensor, cache: Tensor, lines: PagedLines, scale: float, out_THC: Tensor) -> None:
    """Causal attention of several queries a line, the last of its tokens, whose latents are in the cache; written to
    `out_THC`. Places that are no line's query stay as they are."""
    out_THW = q_THW.new_empty(q_THW.shape)
    out_THW[..., : out_THC.shape[2]] = out_THC
    reference.paged_prefill(q_THW, cache, cache, lines, Scoring(scale), out_THW)
    out_THC.copy_(out_THW[..., : out_THC.shape[2]])
